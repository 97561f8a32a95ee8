"""Running the probe: the float32 graph, with every task's real prompts, on the images of the parity gate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from vpdeploy.graphfacts import Precision
from vpdeploy_export.parity import Expectation
from vpdeploy_export.precision.decision import PrecisionReport, choose_islands
from vpdeploy_export.precision.probe import ProbedGraph, watching

_BATCH = 16

PROBE_OPSET: Final = 20
"""What a graph to probe is written for: attention is its parts there, so that its logits can be seen."""


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
