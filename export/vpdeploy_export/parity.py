"""One comparison for every gate: does something that answers give the answers that are expected of it?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

from vpdeploy.errors import ParityError
from vpdeploy.format.graphfacts import Precision
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy.format.task import TaskCard
from vpdeploy.progress import ProgressBar
from vpdeploy.session.session import Session
from vpdeploy_export.images import GateImages
from vpdeploy_train.prompted import PromptedViT, normalise_pixels


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Largest |Δ logit| allowed, as a share of the task's largest |logit| (or of 1, if that is larger).

    Attributes:
        exported: Between a graph and the trained model.
        converted: Between a converted model and its bundle, both on the CPU.
        converted_on_gpu: Between a converted model on a GPU and its bundle on the CPU.
    """

    exported: float
    converted: float
    converted_on_gpu: float


TOLERANCES: Final[dict[Precision, Tolerance]] = {
    # TensorRT multiplies float32 with float16's mantissa (TF32) by default.
    "fp32": Tolerance(exported=2e-4, converted=1e-4, converted_on_gpu=2e-2),
    "fp16": Tolerance(exported=2e-2, converted=1e-2, converted_on_gpu=2e-2),
    # A bfloat16 graph has no CPU kernels: a converted one and its bundle both run in float32 there.
    "bf16": Tolerance(exported=8e-2, converted=1e-4, converted_on_gpu=8e-2),
}
"""By the graph's precision."""

CHECK_WEIGHTS = "nothing was written; check that the run's backbone weights are the original ones"
"""What to do where not the precision can be the cause."""

_BATCH = 16


class Answerer(Protocol):
    """Something that answers: a session, or a converted model in its own runtime."""

    @property
    def runtime(self) -> str:
        """What runs it, for the report."""
        ...

    @property
    def mixes_tasks(self) -> bool:
        """Whether the rows of one batch may belong to different tasks."""
        ...

    def answer(self, pixels: npt.NDArray[np.uint8], tasks: Sequence[str]) -> npt.NDArray[np.float32]:
        """Run one batch.

        Args:
            pixels: uint8 [B, H, W, 3].
            tasks: The task of each row.

        Returns:
            Logits, float32 [B, C or more]; columns beyond a task's classes are not looked at.

        Raises:
            BackendError: The runtime failed.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class SessionAnswerer:
    """A session as something that answers.

    Attributes:
        session: It holds the graph and all the tasks.
    """

    session: Session

    @property
    def runtime(self) -> str:
        """See ``Answerer.runtime``."""
        return self.session.describe().runtime.name

    @property
    def mixes_tasks(self) -> bool:
        """See ``Answerer.mixes_tasks``."""
        return True

    def answer(self, pixels: npt.NDArray[np.uint8], tasks: Sequence[str]) -> npt.NDArray[np.float32]:
        """See ``Answerer.answer``."""
        with ExitStack() as held:
            slots = {task: held.enter_context(self.session.lease(task)).slot for task in dict.fromkeys(tasks)}
            return self.session.run(pixels, np.array([slots[task] for task in tasks], dtype=np.int32))


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What one task should answer.

    Attributes:
        task: The task.
        pixels: uint8 [B, H, W, 3].
        logits: The expected answers, float32 [B, C].
        source: Where the images come from.
    """

    task: str
    pixels: npt.NDArray[np.uint8]
    logits: npt.NDArray[np.float32]
    source: str

    @classmethod
    def of_model(cls, model: PromptedViT, card: TaskCard, images: GateImages) -> Expectation:
        """Return what a trained model answers."""
        logits = expected_logits(model, images.pixels, card.preprocessing)
        return cls(task=card.name, pixels=images.pixels, logits=logits, source=images.source)

    @classmethod
    def of_session(cls, session: Session, images: GateImages) -> list[Expectation]:
        """Return what each task of a session answers to the same images.

        Raises:
            BackendError: The runtime failed.
        """
        answerer, pixels = SessionAnswerer(session=session), images.pixels
        expectations = []
        for task in session.tasks:
            parts = [
                answerer.answer(batch, [task] * len(batch))
                for batch in (pixels[start : start + _BATCH] for start in range(0, len(pixels), _BATCH))
            ]
            logits = np.concatenate(parts)[:, : len(session.card(task).labels)]
            expectations.append(cls(task=task, pixels=pixels, logits=logits, source=images.source))
        return expectations


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """How far answers are from what was expected, on one task's images.

    Example:
        >>> [report] = vpdeploy_export.verify(bundle, models=[vpdeploy_export.TrainedModel.of_run(flowers_run)]).parity
        >>> report.passed, report.max_abs_difference <= report.allowed_difference
        (True, True)

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

    def describe(self, reference: str) -> str:
        """Return in one clause how far the answers are from those of a reference, with both figures.

        Args:
            reference: What gave the expected answers, in words.
        """
        found = f"up to {self.max_abs_difference:.3g} logits"
        found = found if math.isfinite(self.max_abs_difference) else "values that are not finite"
        return (
            f"differs from {reference} by {found} (allowed {self.allowed_difference:.3g}), "
            f"top-1 agreement {self.top1_agreement:.1%} on {self.source}"
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


def compare(answerer: Answerer, expectations: Sequence[Expectation], *, tolerance: float) -> list[ParityReport]:
    """Ask for all answers and compare; where it can be, images of several tasks are mixed in every batch.

    Args:
        answerer: What is asked.
        expectations: What each task should answer.
        tolerance: A field of ``Tolerance``.

    Returns:
        One report for each task, passed or not.

    Raises:
        BackendError: A runtime failed.
    """
    found = [np.zeros_like(each.logits) for each in expectations]
    batches = _batches(expectations, answerer.mixes_tasks)
    with ProgressBar("comparing") as bar:
        for done, batch in enumerate(batches):
            bar.show(done / len(batches))
            pixels = np.stack([expectations[index].pixels[row] for index, row in batch])
            answers = answerer.answer(pixels, [expectations[index].task for index, _ in batch])
            for (index, row), logits in zip(batch, answers, strict=True):
                found[index][row] = logits[: found[index].shape[1]]
    runtime = answerer.runtime
    return [_report(each, logits, runtime, tolerance) for each, logits in zip(expectations, found, strict=True)]


def require_parity(reports: Sequence[ParityReport], *, advice: str = CHECK_WEIGHTS) -> None:
    """Raise unless every report of an exported graph passed.

    Args:
        reports: One for each task.
        advice: What became of the export and what to do, for the message.

    Raises:
        ParityError: Names the first task that did not, with both figures and what to do.
    """
    for report in reports:
        if not report.passed:
            raise ParityError(
                f"task '{report.task}': the exported graph {report.describe('the trained model')}; {advice}"
            )


def _batches(expectations: Sequence[Expectation], mixed: bool) -> list[list[tuple[int, int]]]:
    """Cut all images, each an expectation's index and its own, into batches; of one task each unless mixed."""
    parts = [[(index, row) for row in range(len(each.pixels))] for index, each in enumerate(expectations)]
    if mixed:
        rows = [row for part in parts for row in part]
        parts = [[rows[place] for place in np.random.default_rng(0).permutation(len(rows))]]
    return [part[start : start + _BATCH] for part in parts for start in range(0, len(part), _BATCH)]


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
