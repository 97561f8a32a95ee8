"""One batch: images of several tasks on their way through a session."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vpdeploy.errors import BackendError, VpdeployError
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy.serving.queue import Answer, BatchRun, Logits, Pixels, TaskLease

_log = logging.getLogger(__name__)


class BatchSession(Protocol):
    """What the batcher needs of a session."""

    @property
    def preprocessing(self) -> Preprocessing:
        """How images are brought to the backbone's input."""
        ...

    def lease(self, task: str) -> TaskLease:
        """Take the right to use a task's slot, or raise TaskNotFoundError."""
        ...

    def run(self, images: Pixels, slots: npt.NDArray[np.int32]) -> Logits:
        """Return logits, float32 [B, C], of images uint8 [B, H, W, 3] and slots int32 [B]."""
        ...


@dataclass(frozen=True, kw_only=True)
class BatchReport:
    """One batch that ran, for metrics.

    Attributes:
        images: How many images of each task the batch held.
        models: Task and version of everything that was asked; 1 where a task has no version.
        queue_s: How long each image waited, in s.
        stack_s: How long the images were stacked, in s.
        run_s: How long the session took, in s.
        ended_at: When it ended, a reading of the batcher's clock, in s.
        has_failed: Whether the session raised, or answered what cannot be used.
    """

    images: dict[str, int]
    models: frozenset[tuple[str, int]] = frozenset()
    queue_s: tuple[float, ...]
    stack_s: float = 0.0
    run_s: float
    ended_at: float = 0.0
    has_failed: bool = False


class Batch:
    """Images on their way through the session; whatever goes wrong on the way is this batch's failure alone.

    Args:
        answers: The answers to give to the images; each of them is marked as running.
        clock: Returns the time, in s; it never goes backwards.

    Attributes:
        answers: The same answers.
    """

    def __init__(self, answers: list[Answer], clock: Callable[[], float]) -> None:
        self.answers = answers
        self._clock = clock
        self._logits: Logits | None = None
        self._failure: Exception | None = None
        self._started_at = 0.0
        self._run_s = 0.0
        formed_at = clock()
        try:
            self._images = np.stack([answer.image for answer in answers])
        except MemoryError:
            self._failure = BackendError(f"out of memory for a batch of {len(answers)} images")
        self._stack_s = clock() - formed_at
        self._slots = np.array([answer.slot for answer in answers], dtype=np.int32)

    def run(self, session: BatchSession) -> None:
        """Run the batch and keep the logits, or the failure."""
        self._started_at = self._clock()
        try:
            if self._failure is None:
                self._logits = self._checked(session.run(self._images, self._slots))
        except Exception as error:
            self._failure = error
        self._run_s = self._clock() - self._started_at
        if self._failure is not None:
            kind = type(self._failure).__name__
            _log.error("a batch of %d images failed: %s: %s", len(self.answers), kind, self._failure)

    @property
    def has_failed(self) -> bool:
        """Whether the batch ran, or was to run, and has no logits."""
        return self._failure is not None

    def report(self) -> BatchReport:
        """Return what metrics count of a batch that ran."""
        return BatchReport(
            images=dict(Counter(answer.card.name for answer in self.answers)),
            models=frozenset((answer.card.name, answer.version or 1) for answer in self.answers),
            queue_s=tuple(self._started_at - answer.queued_at for answer in self.answers),
            stack_s=self._stack_s,
            run_s=self._run_s,
            ended_at=self._started_at + self._run_s,
            has_failed=self.has_failed,
        )

    def give_out(self) -> None:
        """Let go of the images and their leases, then answer every image."""
        run = BatchRun(
            size=len(self.answers),
            stack_s=self._stack_s,
            started_at=self._started_at,
            ended_at=self._started_at + self._run_s,
        )
        for answer in self.answers:
            answer.run = run
            answer.leave()
        for index, answer in enumerate(self.answers):
            if self._logits is None:
                answer.fail(_backend_error(self._failure))
            else:
                answer.give(self._logits[index, : len(answer.card.labels)].copy())

    def _checked(self, logits: Logits) -> Logits:
        classes = max(len(answer.card.labels) for answer in self.answers)
        if logits.ndim != 2 or len(logits) != len(self.answers) or logits.shape[1] < classes:
            raise BackendError(
                f"the session should answer {len(self.answers)} images with at least {classes} logits each, "
                f"found shape {list(logits.shape)}"
            )
        return logits


def _backend_error(error: Exception | None) -> BackendError:
    """Return an error of one answer's own: a shared one would grow a traceback with every reader."""
    text = str(error) if isinstance(error, VpdeployError) else f"the batch failed: {type(error).__name__}: {error}"
    own = BackendError(text)
    own.__cause__ = error
    return own
