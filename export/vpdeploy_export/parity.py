"""The parity gate: does the exported graph give what the trained model gives?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vpdeploy.errors import ParityError
from vpdeploy.graphfacts import Precision
from vpdeploy.preprocessing import Preprocessing
from vpdeploy.session import Session
from vpdeploy_train.prompted import PromptedViT, normalise_pixels

TOLERANCES: dict[Precision, float] = {"fp32": 2e-4, "fp16": 2e-2, "bf16": 8e-2}
"""Largest |Δ logit| allowed, as a share of the largest |logit| (or of 1, if that is larger)."""

CHECK_WEIGHTS = "nothing was written; check that the run's backbone weights are the original ones"
"""What to do where not the precision can be the cause."""

_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """How far a graph is from the trained model, on one task's images.

    Attributes:
        task: The task.
        images: How many images were compared.
        source: Where they come from.
        runtime: What ran the graph.
        max_abs_difference: Largest |Δ logit|.
        allowed_difference: The tolerance in logits.
        top1_agreement: Share of images with the same top-1 class.
        undecided: Images whose two best classes lie within twice the tolerance; they may swap.
    """

    task: str
    images: int
    source: str
    runtime: str
    max_abs_difference: float
    allowed_difference: float
    top1_agreement: float
    undecided: int

    @property
    def passed(self) -> bool:
        """Whether difference and top-1 agreement are within tolerance; NaN and infinity never are."""
        agreeing = round(self.top1_agreement * self.images)
        if not math.isfinite(self.max_abs_difference) or not math.isfinite(self.allowed_difference):
            return False
        return self.max_abs_difference <= self.allowed_difference and agreeing >= self.images - self.undecided

    @property
    def difference(self) -> str:
        """The largest difference and what is allowed, in words."""
        found = f"up to {self.max_abs_difference:.3g} logits"
        return (
            f"{found if math.isfinite(self.max_abs_difference) else 'values that are not finite'} "
            f"(allowed {self.allowed_difference:.3g})"
        )

    def to_fields(self) -> dict[str, Any]:
        """Return the JSON form; a number that is not finite is null."""
        return {
            "images": self.images,
            "source": self.source,
            "runtime": self.runtime,
            "max_abs_difference": _finite(self.max_abs_difference),
            "allowed_difference": _finite(self.allowed_difference),
            "top1_agreement": self.top1_agreement,
            "undecided": self.undecided,
        }


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What one task should answer.

    Attributes:
        task: The task.
        pixels: uint8 [B, H, W, 3].
        logits: The trained model's answers, float32 [B, C].
        source: Where the images come from.
    """

    task: str
    pixels: npt.NDArray[np.uint8]
    logits: npt.NDArray[np.float32]
    source: str


def expected_logits(
    model: PromptedViT, pixels: npt.NDArray[np.uint8], preprocessing: Preprocessing
) -> npt.NDArray[np.float32]:
    """Run the trained PyTorch model: uint8 [B, H, W, 3] to float32 logits [B, C]."""
    mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
    model.eval()
    with torch.no_grad():
        parts = [
            model(normalise_pixels(torch.from_numpy(pixels[start : start + _BATCH]), mean, std)).numpy()
            for start in range(0, len(pixels), _BATCH)
        ]
    return np.concatenate(parts)


def compare(session: Session, expectations: Sequence[Expectation], *, precision: Precision) -> list[ParityReport]:
    """Run the graph and compare; where there are several tasks, their images are mixed in every batch.

    Args:
        session: Holds the graph and all the tasks.
        expectations: What each task should answer.
        precision: Of the graph; chooses the tolerance.

    Returns:
        One report for each task, passed or not.
    """
    rows = [(index, row) for index, each in enumerate(expectations) for row in range(len(each.pixels))]
    order = np.random.default_rng(0).permutation(len(rows))
    found = [np.zeros_like(each.logits) for each in expectations]
    leases = [session.lease(each.task) for each in expectations]
    try:
        for start in range(0, len(order), _BATCH):
            batch = [rows[position] for position in order[start : start + _BATCH]]
            pixels = np.stack([expectations[index].pixels[row] for index, row in batch])
            slots = np.array([leases[index].slot for index, _ in batch], dtype=np.int32)
            for (index, row), logits in zip(batch, session.run(pixels, slots), strict=True):
                found[index][row] = logits[: found[index].shape[1]]
    finally:
        for lease in leases:
            lease.release()
    runtime = session.describe().runtime.name
    return [
        _report(each, logits, runtime, TOLERANCES[precision]) for each, logits in zip(expectations, found, strict=True)
    ]


def require_parity(reports: Sequence[ParityReport], *, advice: str = CHECK_WEIGHTS) -> None:
    """Raise unless every report passed.

    Args:
        reports: One for each task.
        advice: What became of the export and what to do, for the message.

    Raises:
        ParityError: Names the first task that did not, with both figures and what to do.
    """
    for report in reports:
        if not report.passed:
            raise ParityError(
                f"task '{report.task}': the exported graph differs from the trained model by {report.difference}, "
                f"top-1 agreement {report.top1_agreement:.1%} on {report.source}; {advice}"
            )


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _report(each: Expectation, found: npt.NDArray[np.float32], runtime: str, tolerance: float) -> ParityReport:
    allowed = tolerance * max(1.0, float(np.abs(each.logits).max()))
    ranked = np.sort(each.logits, axis=1)
    margin = ranked[:, -1] - ranked[:, -2] if ranked.shape[1] > 1 else np.full(len(ranked), np.inf)
    return ParityReport(
        task=each.task,
        images=len(each.pixels),
        source=each.source,
        runtime=runtime,
        max_abs_difference=float(np.abs(found - each.logits).max()),
        allowed_difference=allowed,
        top1_agreement=float((found.argmax(1) == each.logits.argmax(1)).mean()),
        undecided=int((margin <= 2 * allowed).sum()),
    )
