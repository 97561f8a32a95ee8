"""Work off the event loop: inflating, parsing, decoding and encoding, in threads that tasks take turns at."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from vpdeploy.errors import QueueFullError, ShuttingDownError

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """One piece of work that waits.

    Attributes:
        work: What to do.
        future: Takes what it returns or raises.
    """

    work: Callable[[], Any]
    future: Future[Any]


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

    def append(self, line: str, job: Job) -> None:
        """Queue a job behind the others of its line."""
        if not self.waiting(line):
            self._used[line] = max(self._used.get(line, 0.0), self._present)
        self._lines.setdefault(line, OrderedDict())[job] = None
        self._length += 1

    def pop(self, *, most_running: int) -> tuple[str, Job] | None:
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
        return line, job

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

    def remove(self, line: str, job: Job) -> bool:
        """Take one job out, and tell whether it was there."""
        jobs = self._lines.get(line)
        if jobs is None or job not in jobs:
            return False
        del jobs[job]
        if not jobs:
            del self._lines[line]
        self._length -= 1
        return True


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
        self._threads = [
            threading.Thread(target=self._serve, name=f"vpdeploy-work-{index}", daemon=True)
            for index in range(threads + 1)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, line: str, work: Callable[[], _T]) -> Future[_T]:
        """Queue one job; see ``submit_all``."""
        return self.submit_all(line, [work])[0]

    def submit_all(self, line: str, works: Sequence[Callable[[], _T]]) -> list[Future[_T]]:
        """Queue the jobs of one request, all of them or none.

        Args:
            line: Whose turn the jobs take: a task's, or a client's where no one task is asked.
            works: What to do; each is called once, on any thread.

        Returns:
            Futures of what they return; ``cancel`` those that nobody waits for any more.

        Raises:
            QueueFullError: Too many jobs wait, of all or of this line.
            ShuttingDownError: The pool is closed.
        """
        jobs = [Job(work=work, future=Future()) for work in works]
        with self._lock:
            if self._closing:
                raise ShuttingDownError("the server is shutting down; send the request elsewhere")
            waiting, own = len(self._turns), self._turns.waiting(line)
            # A request that finds its line empty is not refused for its size.
            if waiting + len(jobs) > self._max_pending or (own and own + len(jobs) > self._max_pending // 2):
                raise QueueFullError(
                    f"{waiting} requests and images wait to be read, {own} of this task; try again later"
                )
            for job in jobs:
                self._turns.append(line, job)
            self._changed.notify(len(jobs))
        for job in jobs:
            job.future.add_done_callback(partial(self._drop, line, job))
        return [job.future for job in jobs]

    def close(self) -> None:
        """Finish what was accepted and stop the threads."""
        with self._lock:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _drop(self, line: str, job: Job, future: Future[Any]) -> None:
        if future.cancelled():
            with self._lock:
                self._turns.remove(line, job)

    def _serve(self) -> None:
        while True:
            with self._lock:
                while (taken := self._turns.pop(most_running=self._most_running)) is None:
                    if self._closing and not self._turns:
                        return
                    self._changed.wait()
            line, job = taken
            started = self._clock()
            if job.future.set_running_or_notify_cancel():
                _complete(job)
            with self._lock:
                self._turns.charge(line, self._clock() - started)
                if self._closing:  # otherwise this thread takes what the job's end lets run
                    self._changed.notify_all()
            del job, taken  # what it holds must not wait for this thread's next job


def _complete(job: Job) -> None:
    try:
        result = job.work()
    except BaseException as error:  # whatever it is, the request must hear of it
        job.future.set_exception(error)
    else:
        job.future.set_result(result)
