"""Images that wait for a batch: what a client holds of one, and the queue in which tasks take turns."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vpdeploy.errors import VpdeployError
from vpdeploy.format.task import TaskCard

NORMAL_PRIORITY = 2
"""The level of requests that name none; 1 goes before it, 3 behind it, each within its task."""

LAST_PRIORITY = 3

Pixels = npt.NDArray[np.uint8]
Logits = npt.NDArray[np.float32]


class TaskLease(Protocol):
    """The right to use a task's slot until ``release``."""

    slot: int
    card: TaskCard
    version: int | None
    size_bytes: int | None

    def release(self) -> None:
        """End the lease."""
        ...


class SharedLease:
    """One lease for all images that a request sends to a task, so that one version answers them all.

    Args:
        lease: The lease on the task; it is released when the last user leaves.
        users: How many images use it.
    """

    def __init__(self, lease: TaskLease, users: int) -> None:
        self.lease = lease
        self._users = users
        self._lock = threading.Lock()

    def leave(self) -> None:
        """Give up one image's use."""
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if last:
            self.lease.release()


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchRun:
    """When a batch ran, for the images that were in it; times are readings of the batcher's clock, in s.

    Attributes:
        size: Images in the batch.
        stack_s: How long its images were stacked, in s.
        started_at: When the session was called.
        ended_at: When the session returned.
    """

    size: int
    stack_s: float
    started_at: float
    ended_at: float


class Answer(Future[Logits]):
    """The future logits of one image: float32 [C], C = the task's classes, owned by the caller.

    Cancelling it frees its place in the queue; once its batch runs it can no longer be cancelled.

    Args:
        image: uint8 [H, W, 3].
        shared: The request's lease on the task.
        queued_at: The clock's reading when the image was queued, in s.
        expires_at: The reading after which the image must not run, in s; None where it may always run.
        withdraw: Called with the answer when it is cancelled.
        priority: Its level within its task, from 1, which goes first.

    Attributes:
        card: The task as it was when the image was submitted.
        version: The task's published version; None where there is none.
        slot: The task's slot in the table.
        queued_at: The clock's reading when the image was queued, in s.
        priority: Its level within its task, from 1, which goes first.
        is_expired: Whether the deadline had passed when the batch formed.
        run: The run that answered it; None where none has.
    """

    def __init__(
        self,
        image: Pixels,
        shared: SharedLease,
        *,
        queued_at: float,
        expires_at: float | None,
        withdraw: Callable[[Answer], None],
        priority: int = NORMAL_PRIORITY,
    ) -> None:
        super().__init__()
        self.card = shared.lease.card
        self.version = shared.lease.version
        self.slot = shared.lease.slot
        self.queued_at = queued_at
        self.priority = priority
        self.is_expired = False
        self.run: BatchRun | None = None
        self._expires_at = expires_at
        self._image: Pixels | None = image
        self._shared = shared
        self._withdraw = withdraw

    @property
    def image(self) -> Pixels:
        """The image, uint8 [H, W, 3], until the answer is given."""
        if self._image is None:
            raise RuntimeError("the answer was given already")
        return self._image

    def mark_expired(self, now: float) -> bool:
        """Tell, from now on, whether the deadline has passed at the clock reading ``now``."""
        self.is_expired = self._expires_at is not None and self._expires_at <= now
        return self.is_expired

    def cancel(self) -> bool:
        """Cancel unless the image's batch is already running; tell whether it is cancelled."""
        cancelled = super().cancel()
        if cancelled:
            self._withdraw(self)
        return cancelled

    def leave(self) -> None:
        """Let go of the image and the lease. Whoever takes the answer out of the queue calls this, once."""
        self._image = None
        self._shared.leave()

    def refuse(self, error: VpdeployError) -> None:
        """Let go of an image that never ran, and answer it with an error."""
        self.leave()
        if self.set_running_or_notify_cancel():
            self.fail(error)

    def give(self, logits: Logits) -> None:
        """Answer with logits, float32 [C], unless the batcher was abandoned and the image refused meanwhile."""
        with contextlib.suppress(InvalidStateError):
            self.set_result(logits)

    def fail(self, error: VpdeployError) -> None:
        """Answer with an error, unless there is an answer already."""
        with contextlib.suppress(InvalidStateError):
            self.set_exception(error)


class Backlog:
    """The images of one task that wait, by level of priority, in each of which the oldest goes first."""

    def __init__(self) -> None:
        self._levels: dict[int, OrderedDict[Answer, None]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._levels.values()))

    def append(self, answer: Answer) -> None:
        """Queue an image behind the others of its level."""
        self._levels.setdefault(answer.priority, OrderedDict())[answer] = None

    def pop(self) -> Answer:
        """Take the oldest image of the first level that has one."""
        level = min(self._levels)
        answer, _ = self._levels[level].popitem(last=False)
        if not self._levels[level]:
            del self._levels[level]
        return answer

    def remove(self, answer: Answer) -> bool:
        """Take one image out, and tell whether it was there."""
        answers = self._levels.get(answer.priority)
        if answers is None or answer not in answers:
            return False
        del answers[answer]
        if not answers:
            del self._levels[answer.priority]
        return True


class FairQueue:
    """One backlog for each task. Tasks take turns, so that the backlog of one does not hold up the others.

    Priority counts within a task: with it, a request overtakes others of its own task, and takes no turn of another's.

    A queue is not thread-safe: the batcher calls it under its lock.
    """

    def __init__(self) -> None:
        self._turns: OrderedDict[str, Backlog] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, answer: Answer) -> None:
        """Queue an image behind the others of its task and level."""
        if answer.card.name not in self._turns:
            self._turns[answer.card.name] = Backlog()
        self._turns[answer.card.name].append(answer)
        self._length += 1

    def fits_share(self, task: str, more: int, limit: int) -> bool:
        """Tell whether a task, with more images, has no more than its equal share of ``limit`` waiting.

        A task that waits alone has no share: there is nobody to keep room for.
        """
        others = len(self._turns) - (task in self._turns)
        return others > 0 and len(self._turns.get(task, ())) + more <= limit // (others + 1)

    def pop(self) -> Answer:
        """Take the first image of the task whose turn it is."""
        task, backlog = next(iter(self._turns.items()))
        answer = backlog.pop()
        if backlog:
            self._turns.move_to_end(task)
        else:
            del self._turns[task]
        self._length -= 1
        return answer

    def remove(self, answer: Answer) -> bool:
        """Take one image out of the queue, and tell whether it was there."""
        task = answer.card.name
        backlog = self._turns.get(task)
        if backlog is None or not backlog.remove(answer):
            return False
        if not backlog:
            del self._turns[task]
        self._length -= 1
        return True
