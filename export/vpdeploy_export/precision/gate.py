"""The parity gate of an exported graph, in its own precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import torch

from vpdeploy.backends import open_backend
from vpdeploy.backends.protocol import Backend
from vpdeploy.deployed import DeployedGraph
from vpdeploy.manifest import Precision
from vpdeploy.promptset import CompiledPromptSet
from vpdeploy.session import Session
from vpdeploy_export.parity import Expectation, ParityReport, compare
from vpdeploy_export.precision.twins import CPU_RUNTIME, open_rounded

_Open = Callable[[DeployedGraph, Path], Backend]


def _open_file(graph: DeployedGraph, folder: Path) -> Backend:
    return open_backend(graph, runtime=CPU_RUNTIME, threads=torch.get_num_threads())


def _open_rounded(graph: DeployedGraph, folder: Path) -> Backend:
    return open_rounded(graph.path, graph.precision, folder)


_RUNS: Final[dict[Precision, tuple[_Open, ...]]] = {
    "fp32": (_open_file,),
    # The CPU provider runs the file in float32 and would not see an overflow.
    "fp16": (_open_file, _open_rounded),
    "bf16": (_open_rounded,),
}


def run_gate(
    graph: DeployedGraph, expectations: Sequence[Expectation], *, prompt_sets: Sequence[CompiledPromptSet] = ()
) -> list[ParityReport]:
    """Compare a graph with the trained models on the CPU, the tasks mixed in every batch.

    Args:
        graph: The graph as it was written.
        expectations: They say what each task should answer.
        prompt_sets: One for each expectation where the graph is a bundle's; else there are none.

    Returns:
        For each task the worse of its comparisons: the file as it is, and the graph rounded after every operation.
    """
    found: list[list[ParityReport]] = []
    with TemporaryDirectory(prefix="vpdeploy-gate-") as folder:
        for open_run in _RUNS[graph.precision]:
            with Session(
                open_run(graph, Path(folder)),
                preprocessing=graph.preprocessing,
                precision=graph.precision,
                tasks=[(prompt_set, None) for prompt_set in prompt_sets],
                folded=None if graph.folded is None else graph.folded.task,
            ) as session:
                found.append(compare(session, expectations, precision=graph.precision))
    return [max(reports, key=_badness) for reports in zip(*found, strict=True)]


def _badness(report: ParityReport) -> tuple[bool, float]:
    difference = report.max_abs_difference
    return not report.passed, difference if math.isfinite(difference) else math.inf
