"""What to do when an export misses the tolerance of the parity gate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from vpdeploy.artifact import Artifact
from vpdeploy.graphfacts import Precision
from vpdeploy_export.parity import CHECK_WEIGHTS, Expectation
from vpdeploy_export.passes.narrow import TITLES
from vpdeploy_export.precision.bisection import bisect

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
