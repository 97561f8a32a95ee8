"""The gate of a conversion: does the converted model answer as the bundle does?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vpdeploy.errors import ParityError
from vpdeploy.graphfacts import Precision
from vpdeploy.progress import ProgressBar
from vpdeploy.session import Session

CLOSE: Final[dict[Precision, float]] = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 1e-4}
"""Largest |Δ logit| allowed on the CPU, as a share of the task's largest |logit| (or of 1, if that is larger).

A bfloat16 graph has no CPU kernels: both sides run in float32.
"""

CLOSE_ON_GPU: Final[dict[Precision, float]] = {"fp32": 2e-2, "fp16": 2e-2, "bf16": 8e-2}
"""The same between a GPU and the CPU; TensorRT multiplies float32 with float16's mantissa (TF32) by default."""

_BATCH = 8

Answer = Callable[[npt.NDArray[np.uint8], Sequence[str]], npt.NDArray[np.float32]]
"""Runs a converted model: uint8 [B, H, W, 3] and the task of each row; logits [B, C or more]."""


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """How far a converted model is from its bundle, on one task.

    Attributes:
        task: The task.
        images: How many images were compared.
        max_abs_difference: Largest |Δ logit|.
        allowed_difference: The tolerance in logits.
    """

    task: str
    images: int
    max_abs_difference: float
    allowed_difference: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within tolerance; NaN and infinity never are."""
        return math.isfinite(self.max_abs_difference) and self.max_abs_difference <= self.allowed_difference

    def to_fields(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "images": self.images,
            "max_abs_difference": self.max_abs_difference,
            "allowed_difference": self.allowed_difference,
        }


def compare(
    session: Session, pixels: npt.NDArray[np.uint8], answer: Answer, *, tolerance: float, mixed: bool
) -> tuple[Deviation, ...]:
    """Run a converted model and its bundle on all tasks.

    Args:
        session: The bundle.
        pixels: uint8 [B, H, W, 3]; every task sees each of them.
        answer: Runs the converted model.
        tolerance: One of ``CLOSE`` or ``CLOSE_ON_GPU``.
        mixed: Rows of one batch belong to different tasks.
    """
    rows = [(task, index) for task in session.tasks for index in range(len(pixels))]
    if mixed:
        rows = [rows[place] for place in np.random.default_rng(0).permutation(len(rows))]
    cards = {task: session.card(task) for task in session.tasks}
    difference = dict.fromkeys(session.tasks, 0.0)
    largest = dict.fromkeys(session.tasks, 0.0)
    batches = _batches(rows, mixed)
    with ProgressBar("comparing") as bar:
        for done, batch in enumerate(batches):
            bar.show(done / len(batches))
            tasks = [task for task, _ in batch]
            images = np.stack([pixels[index] for _, index in batch])
            expected = session.run(images, np.array([_slot(session, task) for task in tasks], dtype=np.int32))
            for task, right, found in zip(tasks, expected, answer(images, tasks), strict=True):
                classes = len(cards[task].labels)
                delta = np.abs(found[:classes].astype(np.float64) - right[:classes]).max()
                difference[task] = float(np.maximum(difference[task], delta))  # np.maximum keeps a NaN
                largest[task] = max(largest[task], float(np.abs(right[:classes]).max()))
    return tuple(
        Deviation(
            task=task,
            images=len(pixels),
            max_abs_difference=difference[task],
            allowed_difference=tolerance * max(1.0, largest[task]),
        )
        for task in session.tasks
    )


def require_closeness(deviations: Sequence[Deviation], target: str, source: str) -> None:
    """Raise unless every deviation is within tolerance.

    Raises:
        ParityError: Names the first task that is not, with both figures.
    """
    for each in deviations:
        if not each.passed:
            raise ParityError(
                f"task '{each.task}': the model converted to {target} differs from the bundle by up to "
                f"{each.max_abs_difference:.3g} logits (allowed {each.allowed_difference:.3g}) on {source}; "
                "nothing was written; try another version of onnxruntime, or export the bundle again"
            )


def _batches(rows: list[tuple[str, int]], mixed: bool) -> list[list[tuple[str, int]]]:
    """Cut rows into batches; of one task each unless they may be mixed."""
    if mixed:
        return [rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)]
    tasks = dict.fromkeys(task for task, _ in rows)
    parts = [[row for row in rows if row[0] == task] for task in tasks]
    return [part[start : start + _BATCH] for part in parts for start in range(0, len(part), _BATCH)]


def _slot(session: Session, task: str) -> int:
    with session.lease(task) as lease:
        return lease.slot
