"""The batcher: images of all tasks wait in one queue and run in mixed batches."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType

import numpy as np

from vpdeploy.errors import (
    DeadlineExceededError,
    InputError,
    QueueFullError,
    ShuttingDownError,
    SpecError,
    VpdeployError,
)
from vpdeploy.format.task import split_reference
from vpdeploy.serving.batch import Batch, BatchReport, BatchSession
from vpdeploy.serving.pulse import Pulse
from vpdeploy.serving.queue import NORMAL_PRIORITY, Answer, FairQueue, Pixels, SharedLease

_log = logging.getLogger(__name__)

_MAX_DELAY_MS = 60_000


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """When a batch forms, and how much may wait for it.

    Attributes:
        max_batch_size: Images in one batch at most; a full batch does not wait.
        max_delay_ms: How long the first image waits for others while the device is idle.
        max_queue_size: Images that may wait; more are refused, but for tasks that have less than their share of it
            waiting: they may take as much room again.
        deadline_ms: The deadline of requests that name none; None lets them wait as long as it takes.
        size_reason: Why ``max_batch_size`` is what it is, for people.

    Raises:
        SpecError: A value is out of range.

    Example:
        >>> vpdeploy.BatchSettings(max_batch_size=8, max_delay_ms=1.0).max_queue_size
        1024
    """

    max_batch_size: int = 32
    max_delay_ms: float = 2.0
    max_queue_size: int = 1024
    deadline_ms: float | None = None
    size_reason: str = "as set"

    def __post_init__(self) -> None:
        if self.max_batch_size < 1 or self.max_queue_size < 1:
            raise SpecError(
                "batch and queue hold at least 1 image, found "
                f"max_batch_size {self.max_batch_size} and max_queue_size {self.max_queue_size}"
            )
        if not 0 <= self.max_delay_ms <= _MAX_DELAY_MS:
            raise SpecError(f"max_delay_ms should be in [0, {_MAX_DELAY_MS}], found {self.max_delay_ms}")
        if self.deadline_ms is not None and not self.deadline_ms > 0:
            raise SpecError(f"deadline_ms should be more than 0, found {self.deadline_ms}")


class Batcher:
    """Collects images of all tasks and runs them in mixed batches.

    One thread, the runner, does nothing but call the session. Another, the dispatcher, meanwhile stages the next batch
    and gives out the answers of the last one, so that the device waits for neither.

    Close a batcher, or use it as a context manager. Every method may be called from any thread.

    Args:
        session: Runs the batches, always on the same thread; the caller closes it after the batcher.
        settings: When a batch forms, and how much may wait for it; None takes the defaults.
        observer: Called with the report of every batch that ran, on the dispatcher's thread, before the batch's answers
            are given.
        clock: Returns the time, in s; it never goes backwards.

    Example:
        >>> import numpy as np
        >>> pixels = np.zeros((32, 32, 3), np.uint8)
        >>> with vpdeploy.load(zoo) as session, vpdeploy.Batcher(session) as batcher:
        ...     answers = [batcher.submit(pixels, task) for task in ("flowers", "birds")]
        ...     [answer.result().shape for answer in answers]
        [(4,), (7,)]
    """

    def __init__(
        self,
        session: BatchSession,
        settings: BatchSettings | None = None,
        *,
        observer: Callable[[BatchReport], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings or BatchSettings()
        self._session = session
        self._observer = observer
        self._clock = clock
        side = session.preprocessing.image_size
        self._image_shape = (side, side, 3)
        self._lock = threading.Lock()
        self._for_dispatcher = threading.Condition(self._lock)
        self._for_runner = threading.Condition(self._lock)
        self._queue = FairQueue()
        self._form_at = 0.0
        self._closing = False
        self._closed_because = "the server is shutting down"
        self._open: set[Answer] = set()  # accepted and not answered yet, wherever they are
        self._fault: str | None = None
        self._moves = 0
        self._failures = 0
        self._staged: Batch | None = None
        self._running = 0  # images of the batch that is in the runtime
        self._finished: deque[Batch] = deque()
        self._is_done = False
        self._threads = [
            threading.Thread(target=partial(self._guard, name, work), name=f"vpdeploy-{name}", daemon=True)
            for name, work in (("dispatcher", self._dispatch), ("runner", self._run_batches))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def queue_length(self) -> int:
        """Images that wait for a batch."""
        with self._lock:
            return len(self._queue)

    def submit(self, image: Pixels, task: str, *, deadline_s: float | None = None) -> Answer:
        """Queue one image.

        Args:
            image: uint8 [H, W, 3], H = W = ``preprocessing.image_size``; it must not change until it is answered.
            task: The task to ask.
            deadline_s: Seconds from now after which the image is not run any more; None for the settings' default.

        Returns:
            A future of the image's logits; ``cancel`` it when nobody waits for it any more.

        Raises:
            InputError: The image has another shape or dtype.
            TaskNotFoundError: No task of that name is loaded.
            QueueFullError: The queue is full.
            ShuttingDownError: The batcher is closed.
        """
        return self.submit_all([(image, task)], deadline_s=deadline_s)[0]

    def submit_all(
        self,
        rows: Sequence[tuple[Pixels, str]],
        *,
        deadline_s: float | None = None,
        priority: int = NORMAL_PRIORITY,
    ) -> list[Answer]:
        """Queue the images of one request, all of them or none.

        Args:
            rows: Images and the task that each is for.
            deadline_s: Seconds from now after which they are not run any more; None for the settings' default.
            priority: Their level within their task, from 1, which goes first, to ``LAST_PRIORITY``.

        Returns:
            One answer for each row, in order; rows of one task are answered by one version of it.

        Raises:
            InputError: An image has another shape or dtype, or the queue never holds as many.
            TaskNotFoundError: No task of one of the names is loaded.
            QueueFullError: The queue is full.
            ShuttingDownError: The batcher is closed.
        """
        for image, _ in rows:
            if image.dtype != np.uint8 or image.shape != self._image_shape:
                raise InputError(
                    f"image should be uint8 {list(self._image_shape)}, found {image.dtype} {list(image.shape)}"
                )
        if deadline_s is None and self.settings.deadline_ms is not None:
            deadline_s = self.settings.deadline_ms / 1000
        now = self._clock()
        expires_at = None if deadline_s is None else now + deadline_s
        wanted = Counter(task for _, task in rows)
        shared = self._lease_tasks(wanted)
        answers = [
            Answer(
                image, shared[task], queued_at=now, expires_at=expires_at, withdraw=self._withdraw, priority=priority
            )
            for image, task in rows
        ]
        try:
            with self._lock:
                self._refuse_excess(wanted)
                self._enqueue(answers, now)
        except VpdeployError:
            for each in shared.values():
                each.lease.release()
            raise
        return answers

    def check_room(self, tasks: Sequence[str]) -> None:
        """Tell early that more images would be refused, before work is spent on them.

        Args:
            tasks: The task of each image that is to be queued.

        Raises:
            InputError: The queue never holds as many.
            QueueFullError: The queue is full.
            ShuttingDownError: The batcher is closed.
        """
        with self._lock:
            self._refuse_excess(Counter(tasks))

    def pulse(self) -> Pulse:
        """Tell how the threads are."""
        with self._lock:
            place = f"in the runtime, at a batch of {self._running} images" if self._running else "in the batcher"
            return Pulse(
                fault=self._fault,
                is_busy=bool(self._open),
                mark=self._moves,
                place=place,
                failures=self._failures,
            )

    def abandon(self, reason: str) -> None:
        """Refuse everything that is not answered yet, and all that comes: the threads cannot be trusted any more.

        Leases of images that are in a batch are kept, for a runtime may still be reading their slots.

        Args:
            reason: Why, in a few words; clients are told.
        """
        with self._lock:
            self._closing = True
            self._closed_because = reason
            waiting = [self._queue.pop() for _ in range(len(self._queue))]
            unanswered, self._open = self._open, set()
            self._staged = None
            self._is_done = True
            self._for_dispatcher.notify()
            self._for_runner.notify()
        for answer in waiting:
            answer.refuse(self._refusal())
        for answer in unanswered:
            answer.fail(self._refusal())

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> bool:
        """Accept no more images, deal with those that are queued and stop the threads; may be called again.

        Args:
            drain: Whether queued images are run; otherwise they are refused.
            timeout_s: How long to wait for the threads, in s; None for as long as it takes.

        Returns:
            Whether the threads have ended. The session must not be closed while one of them runs a batch.
        """
        refused: list[Answer] = []
        with self._lock:
            self._closing = True
            while not drain and self._queue:
                refused.append(self._queue.pop())
            self._open.difference_update(refused)
            self._for_dispatcher.notify()
        for answer in refused:
            answer.refuse(self._refusal())
        until = None if timeout_s is None else time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(None if until is None else max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def __enter__(self) -> Batcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lease_tasks(self, users: Counter[str]) -> dict[str, SharedLease]:
        """Lease every task once; if one is unknown, none."""
        shared: dict[str, SharedLease] = {}
        try:
            for task, count in users.items():
                shared[task] = SharedLease(self._session.lease(task), count)
        except VpdeployError:
            for each in shared.values():
                each.lease.release()
            raise
        return shared

    def _refuse_excess(self, wanted: Counter[str]) -> None:
        count, limit = sum(wanted.values()), self.settings.max_queue_size
        # Versions of a task share its turns.
        names = Counter[str]()
        for reference, more in wanted.items():
            names[split_reference(reference)[0]] += more
        if self._closing:
            raise self._refusal()
        if count > limit:
            raise InputError(f"a request of {count} images never fits the queue of {limit}; split it")
        # A task that floods the queue fills it; beside it, one below its fair share still finds as much room again.
        within_share = all(self._queue.fits_share(task, more, limit) for task, more in names.items())
        if len(self._queue) + count > (2 * limit if within_share else limit):
            raise QueueFullError(
                f"{len(self._queue)} images wait already and at most {limit} may; try again later, "
                "or start the server with a larger --max-queue-size"
            )

    def _enqueue(self, answers: list[Answer], now: float) -> None:
        if not self._queue:
            self._form_at = now + self.settings.max_delay_ms / 1000
        for answer in answers:
            self._queue.append(answer)
        self._open.update(answers)
        # While images wait already, the dispatcher needs to hear of a full batch only: its delay runs.
        if len(self._queue) == len(answers) or len(self._queue) >= self.settings.max_batch_size:
            self._for_dispatcher.notify()

    def _withdraw(self, answer: Answer) -> None:
        """Give up the place of a cancelled answer."""
        with self._lock:
            removed = self._queue.remove(answer)
            if removed:
                self._open.discard(answer)
        if removed:
            answer.leave()

    def _refusal(self) -> ShuttingDownError:
        return ShuttingDownError(f"{self._closed_because}; send the request elsewhere")

    def _guard(self, name: str, work: Callable[[], None]) -> None:
        """Do a thread's work; should it end before its time, nobody is left waiting for it."""
        try:
            work()
        except BaseException as error:  # whatever it is, the thread is gone
            _log.critical("the %s of batches ended", name, exc_info=error)
            with self._lock:
                self._fault = f"the {name} of batches ended: {type(error).__name__}: {error}"
            self.abandon("the server cannot run batches any more")

    def _dispatch(self) -> None:
        """Stage batches and give out answers until all is done; the dispatcher's thread runs this."""
        while True:
            with self._lock:
                finished, taken = self._wait_for_work()
                if finished is None and not taken:
                    self._is_done = True
                    self._for_runner.notify()
                    return
            if finished is not None:
                self._report(finished)
                finished.give_out()
                self._settle(finished.answers)
            elif batch := self._stack(taken):
                with self._lock:
                    self._staged = batch
                    self._for_runner.notify()

    def _settle(self, answers: Sequence[Answer]) -> None:
        """Count answers as given."""
        with self._lock:
            self._open.difference_update(answers)
            self._moves += 1

    def _wait_for_work(self) -> tuple[Batch | None, list[Answer]]:
        """Wait for a finished batch, or for images to stage; at the end there is neither."""
        full = self.settings.max_batch_size
        while not self._is_done:
            # Answers that are there go out first: clients wait for them.
            if self._finished:
                return self._finished.popleft(), []

            # Stage the next batch when it is full, when its delay is over and the device idle, or at the closing.
            delay: float | None = None
            if self._queue and self._staged is None:
                # While the device is busy, more images may still join a batch that is not full.
                ready = len(self._queue) >= full or self._closing
                if not ready and not self._running:
                    delay = self._form_at - self._clock()
                    ready = delay <= 0
                if ready:
                    return None, self._take()

            # A closed batcher ends when nothing is queued, staged or running.
            elif self._closing and not self._queue and self._staged is None and not self._running:
                return None, []

            # Sleep until a request, a finished batch or the closing wakes this thread, or the batch's delay is over.
            self._for_dispatcher.wait(delay)
        return None, []

    def _take(self) -> list[Answer]:
        """Take the images of the next batch from the queue, and with them those that expired before them."""
        now = self._clock()
        taken: list[Answer] = []
        places = self.settings.max_batch_size
        while self._queue and places:
            answer = self._queue.pop()
            taken.append(answer)
            places -= not answer.mark_expired(now)
        return taken

    def _stack(self, taken: list[Answer]) -> Batch | None:
        """Return the batch of those images that are still wanted; refuse or let go of the others."""
        answers: list[Answer] = []
        for answer in taken:
            if answer.is_expired:
                answer.refuse(DeadlineExceededError("the deadline passed while the image was queued"))
            elif answer.set_running_or_notify_cancel():
                answers.append(answer)
            else:
                answer.leave()
        if len(answers) < len(taken):
            self._settle([answer for answer in taken if answer.done()])
        return Batch(answers, self._clock) if answers else None

    def _run_batches(self) -> None:
        """Run every batch that is staged until all is done; the runner's thread runs this."""
        while True:
            with self._lock:
                while self._staged is None and not self._is_done:
                    self._for_runner.wait()
                batch, self._staged = self._staged, None
                if batch is None:
                    return
                self._running = len(batch.answers)
                self._moves += 1
                self._for_dispatcher.notify()
            batch.run(self._session)
            with self._lock:
                self._running = 0
                self._moves += 1
                self._failures = self._failures + 1 if batch.has_failed else 0
                self._finished.append(batch)
                self._for_dispatcher.notify()

    def _report(self, batch: Batch) -> None:
        if self._observer is None:
            return
        try:
            self._observer(batch.report())
        except Exception:  # a failing metric must not stop the service
            _log.exception("the batch observer failed")
