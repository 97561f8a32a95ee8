"""What stays float32 in a narrower graph: decided by running the float32 one with every task's real prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from vpdeploy.format.graphfacts import Precision
from vpdeploy_export.parity import Expectation
from vpdeploy_export.precision.islands import IslandPart, Islands
from vpdeploy_export.precision.probe import EMBEDDING, FINAL, WEIGHTS, Maxima, ProbedGraph, part_of, watching

_BATCH = 16

PROBE_OPSET: Final = 20
"""What a graph to probe is written for: attention is its parts there, so that its logits can be seen."""

LARGEST: Final[dict[Precision, float]] = {"fp16": 65504.0}
"""Largest finite number of a type, where activations of a trained model can come near it."""

MARGIN: Final = 4.0
"""How far an activation may grow beyond what the probe's images gave before it overflows; constants need none."""


@dataclass(frozen=True, kw_only=True)
class PrecisionReport:
    """What a probe found and what follows.

    Attributes:
        precision: The precision of the graph.
        islands: The parts that stay float32.
        maxima: The largest absolute values by block and place.
        images: Where each task's images come from, by task.
    """

    precision: Precision
    islands: Islands
    maxima: Maxima
    images: dict[str, str]

    def to_fields(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "type": self.precision,
            "float32": self.islands.to_fields(),
            "probe": {
                "largest": LARGEST.get(self.precision),
                "margin": MARGIN,
                "images": self.images,
                "maxima": self.maxima.to_fields(),
            },
        }


def choose_islands(maxima: Maxima, precision: Precision, *, depth: int) -> Islands:
    """Return the parts whose values would overflow the precision.

    A part is float32 where one of its activations exceeds the type's largest number divided by ``MARGIN``, or one of
    its constants the largest number itself. A residual stream that is float32 stays so up to the final norm: blocks
    only add to it.

    Args:
        maxima: What the probe found.
        precision: The precision of the graph.
        depth: The number of blocks, L.
    """
    largest = LARGEST.get(precision)
    if largest is None:
        return Islands()
    blocks: dict[int, frozenset[IslandPart]] = {}
    wide_tokens = False
    for index in range(depth):
        parts: set[IslandPart] = {part_of(place) for place in _overflowing(maxima.of(index), largest)}
        wide_tokens |= "residual" in parts
        if wide_tokens:
            parts.add("residual")
        if parts:
            blocks[index] = frozenset(parts)
    return Islands(
        blocks=blocks,
        embedding=bool(_overflowing(maxima.found.get(EMBEDDING, {}), largest)),
        final=wide_tokens or bool(_overflowing(maxima.found.get(FINAL, {}), largest)),
    )


def _overflowing(places: dict[str, float], largest: float) -> list[str]:
    return [
        place for place, value in places.items() if value > (largest if place.endswith(WEIGHTS) else largest / MARGIN)
    ]


def probe_graph(
    graph: ProbedGraph,
    inputs: Iterable[tuple[Tensor, ...]],
    expectations: Sequence[Expectation],
    *,
    precision: Precision,
) -> PrecisionReport:
    """Probe a graph with all its tasks and decide what of it stays float32 in a narrower one.

    The deployed form of the trained models is run, in float32: the same function, and what the graph will round.

    Args:
        graph: The float32 graph, written for ``PROBE_OPSET``.
        inputs: What it is run on: every task's images, with its prompts where they are no constants.
        expectations: They say where each task's images come from.
        precision: The precision of the graph that will be written.
    """
    with torch.no_grad(), watching(graph) as maxima:
        for each in inputs:
            graph(*each)
    return PrecisionReport(
        precision=precision,
        islands=choose_islands(maxima, precision, depth=len(graph.blocks)),
        maxima=maxima,
        images={each.task: each.source for each in expectations},
    )


def pixel_batches(expectation: Expectation) -> Iterator[Tensor]:
    """Yield a task's images in batches, uint8 [B, H, W, 3]."""
    for start in range(0, len(expectation.pixels), _BATCH):
        yield torch.from_numpy(np.ascontiguousarray(expectation.pixels[start : start + _BATCH]))
