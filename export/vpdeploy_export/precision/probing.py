"""Running the probe: the float32 graph, with every task's real prompts, on the images of the parity gate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from vpdeploy.graphfacts import Precision
from vpdeploy.layout import Layout
from vpdeploy.promptset import CompiledPromptSet
from vpdeploy.table import Table
from vpdeploy_export.parity import Expectation
from vpdeploy_export.precision.decision import PrecisionReport, choose_islands
from vpdeploy_export.precision.probe import Maxima, ProbedGraph, watching

_BATCH = 16

PROBE_OPSET: Final = 20
"""What a graph to probe is written for: attention is its parts there, so that its logits can be seen."""


def probe_folded(graph: ProbedGraph, expectation: Expectation, *, precision: Precision) -> PrecisionReport:
    """Probe one task's graph and decide what of it stays float32 in a narrower one.

    The deployed form of the trained model is run, in float32: the same function, and what the graph will round.

    Args:
        graph: The float32 graph, written for ``PROBE_OPSET``; it takes uint8 images.
        expectation: It gives the images.
        precision: The precision of the graph that will be written.
    """
    maxima = _run(graph, ((pixels,) for pixels in _batches(expectation)))
    return _report(maxima, precision, [expectation], depth=len(graph.blocks))


def probe_switchable(
    graph: ProbedGraph,
    layout: Layout,
    prompt_sets: Sequence[CompiledPromptSet],
    expectations: Sequence[Expectation],
    *,
    precision: Precision,
) -> PrecisionReport:
    """Probe the shared graph with all its tasks and decide what of it stays float32 in a narrower one.

    Args:
        graph: The float32 graph, written for ``PROBE_OPSET``.
        layout: The layout of its table, in float32.
        prompt_sets: All tasks, in that layout.
        expectations: They give each task's images.
        precision: The precision of the graph that will be written.
    """
    table = Table.of(prompt_sets)
    arrays = [torch.from_numpy(table.arrays[spec.name]) for spec in layout.tensors]
    feeds = (
        (pixels, torch.full((len(pixels),), slot, dtype=torch.int32), *arrays)
        for slot, expectation in enumerate(expectations)
        for pixels in _batches(expectation)
    )
    return _report(_run(graph, feeds), precision, expectations, depth=len(graph.blocks))


def _run(graph: ProbedGraph, feeds: Iterable[tuple[Tensor, ...]]) -> Maxima:
    with torch.no_grad(), watching(graph) as maxima:
        for feed in feeds:
            graph(*feed)
    return maxima


def _batches(expectation: Expectation) -> Iterator[Tensor]:
    for start in range(0, len(expectation.pixels), _BATCH):
        yield torch.from_numpy(np.ascontiguousarray(expectation.pixels[start : start + _BATCH]))


def _report(
    maxima: Maxima, precision: Precision, expectations: Sequence[Expectation], *, depth: int
) -> PrecisionReport:
    return PrecisionReport(
        precision=precision,
        islands=choose_islands(maxima, precision, depth=depth),
        maxima=maxima,
        images={each.task: each.source for each in expectations},
    )
