"""What becomes of requests, by task and version: counts and times, the same for every protocol.

The words and what they count are those of Triton's statistics extension; HTTP, gRPC and Prometheus show one account.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from vpdeploy.errors import BackendError, DeadlineExceededError, QueueFullError, ShuttingDownError
from vpdeploy.serving.batch import BatchReport
from vpdeploy.serving.queue import Answer

_MANY = 256
"""Accounts up to this number are not looked through for those of tasks that are gone, until somebody reads them."""


WHOLE = ("@bundle", 1)
"""The account of everything that is served, whatever its task."""


class FailureReason(str, Enum):
    """Why a request failed, in Triton's words."""

    REJECTED = "REJECTED"
    CANCELED = "CANCELED"
    BACKEND = "BACKEND"
    OTHER = "OTHER"

    @classmethod
    def of(cls, error: BaseException) -> FailureReason:
        """Return the reason that an error stands for; what is no ``Exception`` is a cancellation."""
        if isinstance(error, (QueueFullError, DeadlineExceededError, ShuttingDownError)):
            return cls.REJECTED
        if isinstance(error, BackendError):
            return cls.BACKEND
        return cls.OTHER if isinstance(error, Exception) else cls.CANCELED


@dataclass(kw_only=True)
class DurationSum:
    """How often something was timed, and how long it took in all, in ns."""

    count: int = 0
    ns: int = 0

    def add(self, seconds: float) -> None:
        """Count one duration, in s."""
        self.count += 1
        self.ns += int(seconds * 1e9)

    def copy(self) -> DurationSum:
        """Return a sum that no longer grows with this one."""
        return DurationSum(count=self.count, ns=self.ns)

    def to_json(self) -> dict[str, int]:
        """Return Triton's ``duration_stat``."""
        return {"count": self.count, "ns": self.ns}


@dataclass(kw_only=True)
class BatchSizeStatistics:
    """The executions of one batch size in which a task took part; the size counts the images of all tasks."""

    compute_input: DurationSum = field(default_factory=DurationSum)
    compute_infer: DurationSum = field(default_factory=DurationSum)
    compute_output: DurationSum = field(default_factory=DurationSum)

    def copy(self) -> BatchSizeStatistics:
        """Return statistics that no longer grow with these."""
        return BatchSizeStatistics(
            compute_input=self.compute_input.copy(),
            compute_infer=self.compute_infer.copy(),
            compute_output=self.compute_output.copy(),
        )


@dataclass(kw_only=True)
class TaskStatistics:
    """What became of the requests to one version of a task.

    Attributes:
        task: The task's name.
        version: The version.
        last_inference_ms: When the last request came, in ms since 1970; 0 where none did.
        inference_count: Images answered.
        execution_count: Batches that ran with at least one of its images.
        success: Requests answered; from the moment that the server had read them.
        failures: Requests that were not, by the reason.
        queue: Waiting: for a thread that decodes, and for a batch.
        compute_input: Decoding a request's images, and stacking its batch.
        compute_infer: The runtime. Each request of a batch is charged the whole run, as in Triton.
        compute_output: From the end of the run until the request has its answer.
        batches: Executions by batch size.
        pending: Requests that wait for a batch now.
    """

    task: str
    version: int
    last_inference_ms: int = 0
    inference_count: int = 0
    execution_count: int = 0
    success: DurationSum = field(default_factory=DurationSum)
    failures: dict[FailureReason, DurationSum] = field(
        default_factory=lambda: {reason: DurationSum() for reason in FailureReason}
    )
    queue: DurationSum = field(default_factory=DurationSum)
    compute_input: DurationSum = field(default_factory=DurationSum)
    compute_infer: DurationSum = field(default_factory=DurationSum)
    compute_output: DurationSum = field(default_factory=DurationSum)
    batches: dict[int, BatchSizeStatistics] = field(default_factory=dict)
    pending: int = 0

    @property
    def fail(self) -> DurationSum:
        """All requests that failed."""
        return DurationSum(
            count=sum(each.count for each in self.failures.values()), ns=sum(each.ns for each in self.failures.values())
        )

    def copy(self) -> TaskStatistics:
        """Return statistics that no longer grow with these."""
        return replace(
            self,
            success=self.success.copy(),
            failures={reason: each.copy() for reason, each in self.failures.items()},
            queue=self.queue.copy(),
            compute_input=self.compute_input.copy(),
            compute_infer=self.compute_infer.copy(),
            compute_output=self.compute_output.copy(),
            batches={size: each.copy() for size, each in self.batches.items()},
        )

    def to_json(self) -> dict[str, Any]:
        """Return Triton's ``model_stat``."""
        none = DurationSum().to_json()
        return {
            "name": self.task,
            "version": str(self.version),
            "last_inference": self.last_inference_ms,
            "inference_count": self.inference_count,
            "execution_count": self.execution_count,
            "inference_stats": {
                "success": self.success.to_json(),
                "fail": self.fail.to_json(),
                "queue": self.queue.to_json(),
                "compute_input": self.compute_input.to_json(),
                "compute_infer": self.compute_infer.to_json(),
                "compute_output": self.compute_output.to_json(),
                "cache_hit": none,
                "cache_miss": none,
            },
            "batch_stats": [
                {
                    "batch_size": size,
                    "compute_input": each.compute_input.to_json(),
                    "compute_infer": each.compute_infer.to_json(),
                    "compute_output": each.compute_output.to_json(),
                }
                for size, each in sorted(self.batches.items())
            ],
        }


class RequestTimes:
    """The moments of one request on its way through the service, as readings of ``time.monotonic``, in s.

    Attributes:
        models: Task and version of each task that is asked.
        accepted_at: When the request was read and understood.
        decodings: Beginning and end of each image's decoding.
        answers: The answers, once the images are queued; before, none.
        answered_at: When the request was answered or failed; None until then.
    """

    __slots__ = ("accepted_at", "answered_at", "answers", "decodings", "models")

    def __init__(self, models: Sequence[tuple[str, int]], accepted_at: float) -> None:
        self.models = models
        self.accepted_at = accepted_at
        self.decodings: list[tuple[float, float]] = []
        self.answers: Sequence[Answer] = ()
        self.answered_at: float | None = None

    @property
    def is_pending(self) -> bool:
        """Whether no batch has taken it up yet."""
        return not self.answers or not all(answer.running() or answer.done() for answer in self.answers)

    @property
    def decode_span(self) -> tuple[float, float] | None:
        """When decoding began and when it ended; None where nothing was decoded."""
        if not self.decodings:
            return None
        return min(begin for begin, _ in self.decodings), max(end for _, end in self.decodings)

    @property
    def run_span(self) -> tuple[float, float] | None:
        """When the first of its batches began to run and when the last one ended; None where none ran."""
        runs = [answer.run for answer in self.answers if answer.run is not None]
        if not runs:
            return None
        return min(run.started_at for run in runs), max(run.ended_at for run in runs)

    @property
    def stack_s(self) -> float:
        """How long its batches were stacked, in s; of several batches, the longest."""
        return max((answer.run.stack_s for answer in self.answers if answer.run is not None), default=0.0)

    @property
    def queue_s(self) -> float:
        """How long it waited so far: for a thread that decodes, and for a batch to run."""
        decoding, running = self.decode_span, self.run_span
        now = self.answered_at if self.answered_at is not None else time.monotonic()
        decoded_s = decoding[1] - decoding[0] if decoding is not None else 0.0
        until = running[0] if running is not None else now
        return max(0.0, until - self.accepted_at - decoded_s - self.stack_s)


class Statistics:
    """The account of all tasks. Every method may be called from any thread.

    Args:
        loaded: Returns names and versions of the loaded tasks; accounts of others are closed.
        clock: Returns the time, in s; that of the batcher.
        wall_clock: Returns the time since 1970, in s.
    """

    def __init__(
        self,
        loaded: Callable[[], Collection[tuple[str, int]]],
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._loaded = loaded
        self._clock = clock
        self._wall_clock = wall_clock
        self._lock = threading.Lock()
        self._accounts: dict[tuple[str, int], TaskStatistics] = {}
        self._open: set[RequestTimes] = set()

    def open(self, models: Sequence[tuple[str, int]]) -> RequestTimes:
        """Begin to time a request.

        Args:
            models: Task and version of each task that is asked.

        Returns:
            Its times, which the service fills in; ``succeed`` or ``fail`` must follow.
        """
        times = RequestTimes(models, self._clock())
        with self._lock:
            self._open.add(times)
        return times

    def succeed(self, times: RequestTimes) -> None:
        """Count an answered request: once for each task that was asked."""
        times.answered_at = now = self._clock()
        decoding, running = times.decode_span, times.run_span
        queue_s, stack_s = times.queue_s, times.stack_s
        input_s = stack_s + (decoding[1] - decoding[0] if decoding is not None else 0.0)
        began_at, ended_at = running if running is not None else (now, now)
        images: dict[tuple[str, int], int] = {}
        for answer in times.answers:
            model = (answer.card.name, answer.version or 1)
            images[model] = images.get(model, 0) + 1
        last_ms = int(self._wall_clock() * 1000)
        with self._lock:
            self._open.discard(times)
            for model, count in (*images.items(), (WHOLE, len(times.answers))):
                account = self._account(model)
                account.last_inference_ms = last_ms
                account.inference_count += count
                account.success.add(now - times.accepted_at)
                account.queue.add(queue_s)
                account.compute_input.add(input_s)
                account.compute_infer.add(ended_at - began_at)
                account.compute_output.add(now - ended_at)

    def fail(self, times: RequestTimes, error: BaseException) -> None:
        """Count a request that failed: once for each task that was asked."""
        times.answered_at = now = self._clock()
        reason = FailureReason.of(error)
        last_ms = int(self._wall_clock() * 1000)
        with self._lock:
            self._open.discard(times)
            for model in (*times.models, WHOLE):
                account = self._account(model)
                account.last_inference_ms = last_ms
                account.failures[reason].add(now - times.accepted_at)

    def count_batch(self, report: BatchReport) -> None:
        """Count a batch, once for each task in it; one that failed is no execution."""
        if report.has_failed:
            return
        size = len(report.queue_s)
        output_s = max(0.0, self._clock() - report.ended_at)
        with self._lock:
            for model in (*report.models, WHOLE):
                account = self._account(model)
                account.execution_count += 1
                sums = account.batches.get(size)
                if sums is None:
                    sums = account.batches[size] = BatchSizeStatistics()
                sums.compute_input.add(report.stack_s)
                sums.compute_infer.add(report.run_s)
                sums.compute_output.add(output_s)

    def read(self) -> list[TaskStatistics]:
        """Return a copy of the accounts of all loaded tasks, by name and version; those never asked are empty."""
        loaded = frozenset(self._loaded())
        with self._lock:
            self._close_others(loaded)
            known = {model: account for model, account in self._accounts.items() if model != WHOLE}
            waiting = [times.models for times in self._open if times.is_pending]
        accounts = {}
        for model, account in known.items():
            with self._lock:  # one at a time: requests are counted meanwhile
                accounts[model] = account.copy()
        for model in loaded - accounts.keys():
            accounts[model] = TaskStatistics(task=model[0], version=model[1])
        for models in waiting:
            for model in models:
                if model in accounts:
                    accounts[model].pending += 1
        return [account for _, account in sorted(accounts.items())]

    def read_whole(self) -> TaskStatistics:
        """Return a copy of the account of everything, in which each request and each batch counts once."""
        with self._lock:
            return self._account(WHOLE).copy()

    def _account(self, model: tuple[str, int]) -> TaskStatistics:
        account = self._accounts.get(model)
        if account is None:
            # Nobody may be reading, while tasks come and go.
            if len(self._accounts) >= _MANY and len(self._accounts) >= 2 * len(loaded := frozenset(self._loaded())):
                self._close_others(loaded)
            account = self._accounts[model] = TaskStatistics(task=model[0], version=model[1])
        return account

    def _close_others(self, loaded: frozenset[tuple[str, int]]) -> None:
        for model in [model for model in self._accounts if model not in loaded and model != WHOLE]:
            del self._accounts[model]
