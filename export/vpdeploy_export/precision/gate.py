"""The parity gate of an exported graph, in its own precision, and what to do where it is missed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import torch

from vpdeploy.backends import open_backend
from vpdeploy.backends.protocol import Backend
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.graphfacts import Precision
from vpdeploy.session.session import Session
from vpdeploy_export.parity import CHECK_WEIGHTS, TOLERANCES, Expectation, ParityReport, SessionAnswerer, compare
from vpdeploy_export.passes.narrow import TITLES
from vpdeploy_export.precision.bisection import bisect
from vpdeploy_export.precision.twins import CPU_RUNTIME, open_rounded

_Open = Callable[[Artifact, Path], Backend]


def _open_file(artifact: Artifact, folder: Path) -> Backend:
    return open_backend(artifact, runtime=CPU_RUNTIME, threads=torch.get_num_threads())


def _open_rounded(artifact: Artifact, folder: Path) -> Backend:
    return open_rounded(artifact.graph_path, artifact.precision, folder)


_RUNS: Final[dict[Precision, tuple[_Open, ...]]] = {
    "fp32": (_open_file,),
    # The CPU provider runs the file in float32 and would not see an overflow.
    "fp16": (_open_file, _open_rounded),
    "bf16": (_open_rounded,),
}


def run_gate(artifact: Artifact, expectations: Sequence[Expectation]) -> list[ParityReport]:
    """Compare a graph with the trained models on the CPU, the tasks mixed in every batch.

    Args:
        artifact: The graph as it was written, with the tasks that are compared.
        expectations: They say what each task should answer.

    Returns:
        For each task the worse of its comparisons: the file as it is, and the graph rounded after every operation.
    """
    tolerance = TOLERANCES[artifact.precision].exported
    found: list[list[ParityReport]] = []
    with TemporaryDirectory(prefix="vpdeploy-gate-") as folder:
        for open_run in _RUNS[artifact.precision]:
            with Session(artifact, open_run(artifact, Path(folder))) as session:
                found.append(compare(SessionAnswerer(session=session), expectations, tolerance=tolerance))
    return [max(reports, key=_badness) for reports in zip(*found, strict=True)]


def _badness(report: ParityReport) -> tuple[bool, float]:
    difference = report.max_abs_difference
    return not report.passed, difference if math.isfinite(difference) else math.inf


_NEXT: Final[dict[Precision, str]] = {
    "fp16": "try --bf16, or leave --fp16 out for float32",
    "bf16": "try --fp16, or leave --bf16 out for float32",
}


def advise_export(artifact: Artifact, expectations: Sequence[Expectation]) -> str:
    """Say what became of an export that missed the tolerance, which value left it first, and what to try next."""
    if artifact.precision not in _NEXT:
        return CHECK_WEIGHTS
    found = bisect(artifact, expectations)
    if found.first is None:
        return f"{found.describe()}, so the precision is not the cause; {CHECK_WEIGHTS}"
    return f"{found.describe()}; nothing was written; {_NEXT[artifact.precision]}"


def advise_addition(precision: Precision) -> str:
    """Say what to do with a task that an existing graph does not carry."""
    if precision not in _NEXT:
        return CHECK_WEIGHTS
    return (
        f"nothing was written; the bundle's {TITLES[precision]} graph was not probed with this task: export the bundle "
        f"again with all its runs, or {_NEXT[precision]}"
    )
