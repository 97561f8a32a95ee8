"""Work off the event loop: inflating, parsing, decoding and encoding, in threads that tasks take turns at."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from vpdeploy.errors import QueueFullError, ShuttingDownError, VpdeployError
from vpdeploy.server.mailbox import running_mailbox
from vpdeploy.serving.pulse import Pulse

_T = TypeVar("_T")

_log = logging.getLogger(__name__)


class Job:
    """One piece of work that waits.

    Args:
        line: Whose turn it takes.
        work: What to do, once.
        deliver: Called once, on any thread, with what the work returns or raises.
    """

    def __init__(
        self, line: str, work: Callable[[], Any], deliver: Callable[[Any, BaseException | None], None]
    ) -> None:
        self.line = line
        self._work = work
        self._deliver = deliver

    def run(self) -> None:
        """Do the work, and hold nothing of it any more: bodies are large, and live until the last one lets go."""
        work, deliver = self._work, self._deliver
        del self._work
        result, failure = None, None
        try:
            result = work()
        except BaseException as error:  # whatever it is, the request must hear of it
            failure = error
            if isinstance(error, VpdeployError):  # the log shows where others come from
                forget_frames(error)
        del work
        deliver(result, failure)
        self._deliver = _to_nobody
        del result, failure

    def refuse(self, error: VpdeployError) -> None:
        """Deliver an error, whether the work has begun or not; what it may still return is of no use any more."""
        self._deliver(None, error)


def _to_nobody(result: Any, failure: BaseException | None) -> None:
    """Deliver what was delivered already."""


class Turns:
    """One queue of jobs for each line, as a task's requests form one. The line that has used the least goes next.

    Start-time fair queueing (Goyal, Vin and Cheng 1996), with the time that jobs turn out to take: a line that comes
    anew starts where the present one stands, so that nobody saves up turns, or pays for time when nobody waited. Not
    thread-safe: the pool calls it under its lock.
    """

    def __init__(self) -> None:
        self._lines: OrderedDict[str, OrderedDict[Job, None]] = OrderedDict()
        self._used: dict[str, float] = {}
        self._running: dict[str, int] = {}
        self._present = 0.0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def waiting(self, line: str) -> int:
        """Return how many jobs of a line wait."""
        return len(self._lines.get(line, ()))

    def append(self, job: Job) -> None:
        """Queue a job behind the others of its line."""
        line = job.line
        if not self.waiting(line):
            self._used[line] = max(self._used.get(line, 0.0), self._present)
        self._lines.setdefault(line, OrderedDict())[job] = None
        self._length += 1

    def pop(self, *, most_running: int) -> Job | None:
        """Take the next job, of the line that used the least among those of which fewer than so many run."""
        ready = [line for line in self._lines if self._running.get(line, 0) < most_running]
        if not ready:
            return None
        line = min(ready, key=self._used.__getitem__)  # of equal ones, the one that waits longest
        self._present = max(self._present, self._used[line])
        jobs = self._lines[line]
        job, _ = jobs.popitem(last=False)
        if jobs:
            self._lines.move_to_end(line)
        else:
            del self._lines[line]
        self._length -= 1
        self._running[line] = self._running.get(line, 0) + 1
        return job

    def charge(self, line: str, seconds: float) -> None:
        """Count the time that a job took, once it has ended."""
        self._used[line] = self._used.get(line, self._present) + seconds
        self._running[line] -= 1
        if not self._running[line]:
            del self._running[line]
        # Lines that are idle and owe nothing are as good as new.
        for name in [name for name, used in self._used.items() if used <= self._present]:
            if name not in self._lines and name not in self._running:
                del self._used[name]

    def clear(self) -> list[Job]:
        """Take all jobs out, and return them."""
        jobs = [job for line in self._lines.values() for job in line]
        self._lines.clear()
        self._length = 0
        return jobs

    def remove(self, job: Job) -> None:
        """Take one job out, if it still waits."""
        jobs = self._lines.get(job.line)
        if jobs is not None and job in jobs:
            del jobs[job]
            self._length -= 1
            if not jobs:
                del self._lines[job.line]


class WorkPool:
    """Threads for all work on requests but the runtime's own.

    There is one thread more than ``threads``, and no line may occupy more than ``threads``: a line that floods the pool
    always leaves a thread for another one to start at once.

    Args:
        threads: How many threads one line may occupy.
        max_pending: Jobs that may wait; more are refused. Half of them may be of one line.
        clock: Tells the time that jobs take, in s; the CPU time of a thread by default.
    """

    def __init__(self, *, threads: int, max_pending: int, clock: Callable[[], float] = time.thread_time) -> None:
        self._most_running = threads
        self._max_pending = max_pending
        self._clock = clock
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._turns = Turns()
        self._closing = False
        self._closed_because = "the server is shutting down"
        self._fault: str | None = None
        self._begun = 0
        self._active: dict[Job, int] = {}  # with the number of its beginning, the oldest first
        self._threads = [
            threading.Thread(target=self._guard, name=f"vpdeploy-work-{index}", daemon=True)
            for index in range(threads + 1)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, line: str, work: Callable[[], _T]) -> asyncio.Future[_T]:
        """Queue one job; see ``submit_all``."""
        return self.submit_all(line, [work])[0]

    def submit_all(self, line: str, works: Sequence[Callable[[], _T]]) -> list[asyncio.Future[_T]]:
        """Queue the jobs of one request, all of them or none; called on an event loop.

        Args:
            line: Whose turn the jobs take: a task's, or a client's where no one task is asked.
            works: What to do; each is called once at most, on any thread.

        Returns:
            The running loop's futures of what they return. Cancelling one frees its place; work that has begun goes on.

        Raises:
            QueueFullError: Too many jobs wait, of all or of this line.
            ShuttingDownError: The pool is closed.
        """
        loop = asyncio.get_running_loop()
        # Not futures of concurrent.futures: asyncio ties these into cycles, and a cycle holds its result until it is
        # collected.
        futures: list[asyncio.Future[_T]] = [loop.create_future() for _ in works]
        post = running_mailbox().post
        jobs = [Job(line, work, partial(post, _settle, future)) for work, future in zip(works, futures, strict=True)]
        with self._lock:
            if self._closing:
                raise self._refusal()
            waiting, own = len(self._turns), self._turns.waiting(line)
            # A request that finds its line empty is not refused for its size.
            if waiting + len(jobs) > self._max_pending or (own and own + len(jobs) > self._max_pending // 2):
                raise QueueFullError(
                    f"{waiting} requests and images wait to be read, {own} of this task; try again later"
                )
            for job in jobs:
                self._turns.append(job)
            self._changed.notify(len(jobs))
        for job, future in zip(jobs, futures, strict=True):
            future.add_done_callback(partial(self._withdraw, job))
        return futures

    def pulse(self) -> Pulse:
        """Tell how the threads are. They stand still where as many as one line may occupy are at the same jobs."""
        with self._lock:
            stuck = list(self._active.values())[: self._most_running]
            return Pulse(
                fault=self._fault,
                is_busy=len(stuck) == self._most_running,
                mark=stuck[-1] if stuck else 0,
                place=f"in all {self._most_running} threads that read requests and decode images",
            )

    def abandon(self, reason: str) -> None:
        """Refuse everything that is not done yet, and all that comes: the threads cannot be trusted any more.

        Args:
            reason: Why, in a few words; clients are told.
        """
        with self._lock:
            self._closing = True
            self._closed_because = reason
            refused = [*self._active, *self._turns.clear()]
            self._changed.notify_all()
        for job in refused:
            job.refuse(self._refusal())

    def close(self, *, timeout_s: float | None = None) -> bool:
        """Finish what was accepted and stop the threads.

        Args:
            timeout_s: How long to wait for the threads, in s; None for as long as it takes.

        Returns:
            Whether the threads have ended.
        """
        with self._lock:
            self._closing = True
            self._changed.notify_all()
        until = None if timeout_s is None else time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(None if until is None else max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _refusal(self) -> ShuttingDownError:
        return ShuttingDownError(f"{self._closed_because}; send the request elsewhere")

    def _withdraw(self, job: Job, future: asyncio.Future[Any]) -> None:
        if future.cancelled():
            with self._lock:
                self._turns.remove(job)

    def _guard(self) -> None:
        """Serve; should the thread end before its time, nobody is left waiting for it."""
        try:
            self._serve()
        except BaseException as error:  # whatever it is, the thread is gone
            _log.critical("a thread that reads requests and decodes images ended", exc_info=error)
            with self._lock:
                self._fault = f"a thread that reads requests and decodes images ended: {type(error).__name__}: {error}"
            self.abandon("the server cannot read requests any more")

    def _serve(self) -> None:
        while True:
            with self._lock:
                while (job := self._turns.pop(most_running=self._most_running)) is None:
                    if self._closing and not self._turns:
                        return
                    self._changed.wait()
                self._begun += 1
                self._active[job] = self._begun
            started = self._clock()
            job.run()
            with self._lock:
                del self._active[job]
                self._turns.charge(job.line, self._clock() - started)
                if self._closing:  # otherwise this thread takes what the job's end lets run
                    self._changed.notify_all()
            del job  # what it holds must not wait for this thread's next job


def _settle(future: asyncio.Future[Any], result: Any, failure: BaseException | None) -> None:
    if future.done():
        return
    if failure is None:
        future.set_result(result)
    else:
        future.set_exception(failure)


def forget_frames(error: BaseException | None) -> None:
    """Let go of what an error's frames hold: bodies, which would else stay until the next collection of cycles."""
    while error is not None:
        error.__traceback__ = None
        error = error.__context__
