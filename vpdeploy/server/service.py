"""The service behind every protocol: encoded images or pixels and task names in, classified images out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol, TypeVar

import numpy as np

from vpdeploy.errors import (
    BackendError,
    DeadlineExceededError,
    InputError,
    QueueFullError,
    SpecError,
    TaskNotFoundError,
    VpdeployError,
)
from vpdeploy.format.task import TaskCard, split_reference
from vpdeploy.server.access import Access, Grant, Scope
from vpdeploy.server.activity import Activity
from vpdeploy.server.administration import Administration
from vpdeploy.server.budget import MemoryBudget
from vpdeploy.server.decoding import Decoder
from vpdeploy.server.mailbox import running_mailbox
from vpdeploy.server.metrics import Metrics
from vpdeploy.server.recompiling import RunCompiler
from vpdeploy.server.request_context import CURRENT_REQUEST
from vpdeploy.server.settings import ServerSettings
from vpdeploy.server.statistics import RequestTimes, Statistics
from vpdeploy.server.statuses import ForbiddenError
from vpdeploy.server.tokens import read_access
from vpdeploy.server.watchdog import Watchdog
from vpdeploy.server.work import WorkPool
from vpdeploy.serving.batch import BatchReport, BatchSession
from vpdeploy.serving.batcher import Batcher
from vpdeploy.serving.pulse import Pulse
from vpdeploy.serving.queue import NORMAL_PRIORITY, Answer, Logits, Pixels
from vpdeploy.session.prediction import softmax
from vpdeploy.session.session import SessionDescription, SyncReport
from vpdeploy.text import cut_name

_T = TypeVar("_T")

_LOADS = 3
"""How often a version is loaded for one request, where others push it out before it is used."""

_log = logging.getLogger(__name__)

_BEAT_S = 1.0
_PROBE_DEADLINE_S = 5.0

_GIVEN_UP = "the server cannot answer any more and is ending"


class ServedSession(BatchSession, Protocol):
    """What the server needs of a session."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the loaded tasks."""
        ...

    @property
    def unloaded(self) -> tuple[str, ...]:
        """Names of the tasks that were unloaded."""
        ...

    def load_task(self, task: str) -> None:
        """Serve a task as the bundle on disk has it now."""
        ...

    def unload_task(self, task: str) -> None:
        """Serve a task of the bundle no longer, until it is loaded."""
        ...

    @property
    def failures(self) -> Mapping[str, str]:
        """What is wrong with the bundle's tasks that are not loaded, or in an older version only, by name."""
        ...

    def describe(self) -> SessionDescription:
        """Return the runtime, the precision and the table's size."""
        ...

    def sync(self) -> SyncReport:
        """Bring the loaded tasks in line with the bundle on disk."""
        ...

    def load_version(self, task: str, version: int) -> None:
        """Load a version that the bundle keeps, beside the one that is served."""
        ...


@dataclass(frozen=True, kw_only=True)
class ServedTask:
    """A loaded task.

    Attributes:
        card: What is known of it.
        version: The task's published version; 1 where there is none.
        size_bytes: Size of its compiled prompt set; None of a folded model, whose prompts are constants.
        reference: What it was asked for as, with its version where one was named; None where it answered.
    """

    card: TaskCard
    version: int
    size_bytes: int | None = None
    reference: str | None = None

    @property
    def val_accuracy(self) -> float | None:
        """Accuracy on the validation images as training recorded it, in [0, 1]; None where it did not."""
        metrics = self.card.details.get("metrics")
        found = metrics.get("val_accuracy") if isinstance(metrics, dict) else None
        # Free-form details: anything may stand there.
        return float(found) if isinstance(found, (int, float)) and 0 <= found <= 1 else None


@dataclass(frozen=True, kw_only=True)
class Classified:
    """One image, classified by one version of one task.

    Attributes:
        task: The task as it was when it answered.
        logits: float32 [C], C = the task's classes.
    """

    task: ServedTask
    logits: Logits

    @cached_property
    def probabilities(self) -> Logits:
        """Softmax of the logits, float32 [C]."""
        return softmax(self.logits)


class Service:
    """Budget, decoder and batcher of one server. Its coroutines belong to one event loop; ``close`` it at the end.

    Args:
        session: Runs the batches; the caller closes it after the service, if ``is_closed``.
        settings: What is accepted, and how much of it at a time.

    Attributes:
        draining: Whether the server was told to stop.
        is_closed: Whether every thread has ended; set where the app's lifespan ends.
        on_fault: Called, on any thread, where the watchdog has found that nothing will be answered any more.
    """

    def __init__(self, session: ServedSession, settings: ServerSettings) -> None:
        self.session = session
        self.settings = settings
        self.access = read_access(
            token=settings.token, admin_token=settings.admin_token, token_file=settings.token_file
        )
        self.activity = Activity()
        check_administration(settings, self.access)
        self.administration = (
            None
            if settings.administered is None
            else Administration(settings.administered, session, compiler=RunCompiler(settings.weights))
        )
        self.draining = False
        self.is_closed = False
        self.on_fault: Callable[[], None] = lambda: None
        self.statistics = Statistics(self._versions)
        self.metrics = Metrics(lambda: session.tasks, self.statistics.read)
        self.batcher = Batcher(session, settings.batching, observer=self._count_batch)
        self.budget = MemoryBudget(total_bytes=settings.max_buffered_bytes, client_bytes=settings.client_bytes)
        self.pool = WorkPool(threads=settings.decode_threads, max_pending=2 * settings.batching.max_queue_size)
        self._decoder = Decoder(
            session.preprocessing, pool=self.pool, budget=self.budget, max_pixels=settings.max_pixels
        )
        self._beats = 0
        self.watchdog = Watchdog(
            [self.batcher.pulse, self.pool.pulse, self._loop_pulse],
            stall_s=settings.stall_s,
            probe=self._probe,
            on_fault=self._give_up,
        )
        self.metrics.watch_value(
            "vpdeploy_body_bytes",
            "Bytes that requests make the server hold: bodies, and pixels that are being decoded.",
            lambda: self.budget.held_bytes,
        )
        self.metrics.watch_value(
            "vpdeploy_queue_images", "Images that wait for a batch.", lambda: self.batcher.queue_length
        )
        self.metrics.watch_value("vpdeploy_tasks", "Loaded tasks.", lambda: len(session.tasks))
        self.metrics.watch_value(
            "vpdeploy_failed_tasks",
            "Tasks of the bundle that could not be loaded, or brought to its version.",
            lambda: len(session.failures),
        )
        self.metrics.watch_value(
            "vpdeploy_table_slots", "Slots of the table; it grows where none is free.", lambda: session.describe().slots
        )
        self.metrics.watch_value(
            "vpdeploy_table_slots_used",
            "Slots that are taken, also by versions that only requests under way still use.",
            lambda: session.describe().slots_used,
        )
        self.metrics.watch_value(
            "vpdeploy_table_bytes",
            "Bytes of all loaded prompt sets on the device.",
            lambda: session.describe().table_bytes,
        )

    @property
    def is_ready(self) -> bool:
        """Whether new requests are welcome."""
        return self.doubt is None

    @property
    def doubt(self) -> str | None:
        """Why new requests had better go elsewhere; None while they are welcome."""
        return self.watchdog.fault or ("the server is shutting down" if self.draining else self.watchdog.doubt)

    async def beat(self) -> None:
        """Show the watchdog that the event loop is alive, until cancelled."""
        while True:
            self._beats += 1
            await asyncio.sleep(min(_BEAT_S, self.settings.stall_s / 10))

    def tasks(self, grant: Grant) -> list[ServedTask]:
        """Return the loaded tasks that exist for a token.

        Raises:
            ForbiddenError: The token is not good for tasks.
        """
        grant.require(Scope.INFER, Scope.ADMIN)
        served = []
        for name in grant.covered(self.session.tasks):
            with contextlib.suppress(TaskNotFoundError):  # it has just been removed
                served.append(self.task(name, grant))
        return served

    def failures(self, grant: Grant) -> dict[str, str]:
        """Return what is wrong with tasks that could not be loaded, of those that exist for a token."""
        return {name: reason for name, reason in self.session.failures.items() if grant.covers(name)}

    def task(self, name: str, grant: Grant) -> ServedTask:
        """Return a loaded task.

        Raises:
            ForbiddenError: The token is not good for tasks.
            TaskNotFoundError: No task of that name is loaded, or it does not exist for the token.
        """
        grant.require(Scope.INFER, Scope.ADMIN)
        with self._as_seen_by(grant):
            if not grant.covers(name):
                raise TaskNotFoundError(name)
            lease = self.session.lease(name)
        lease.release()
        return ServedTask(card=lease.card, version=lease.version or 1, size_bytes=lease.size_bytes, reference=name)

    async def version(self, name: str, version: str | None, *, client: str, grant: Grant) -> ServedTask:
        """Return a loaded task, or a version of it that the bundle keeps, which is loaded if it is not.

        Args:
            name: The task's name.
            version: The version; None or empty for the one that is served.
            client: Whose share of the work loading takes.
            grant: What the request may do.

        Raises:
            ForbiddenError: The token is not good for tasks.
            TaskNotFoundError: There is no such task or version, or it does not exist for the token.
        """
        reference = f"{name}@{version}" if version else name
        if version and split_reference(reference)[1] is None:
            self.task(name, grant)
            raise TaskNotFoundError(f"task '{cut_name(name)}' has no version '{cut_name(version, 20)}'")
        return await self._loaded(reference, client, grant)

    async def _loaded(self, reference: str, client: str, grant: Grant) -> ServedTask:
        """Return a loaded task; a version that is asked for and not loaded is loaded first."""
        name, version = split_reference(reference)
        for _ in range(_LOADS):
            try:
                return self.task(reference, grant)
            except TaskNotFoundError:
                if version is None:
                    raise
            self.task(name, grant)  # it must be there for the token
            load = partial(self.session.load_version, name, version)
            await self.off_loop(self.line([name], client, grant), load)
        raise QueueFullError("more versions are asked for than stay loaded; try again later")

    @contextlib.contextmanager
    def _as_seen_by(self, grant: Grant) -> Iterator[None]:
        """Name no task in an error that does not exist for the token."""
        try:
            yield
        except TaskNotFoundError:
            if grant.tasks is None:
                raise
            known = ", ".join(grant.covered(self.session.tasks)[:20]) or "none"
            raise TaskNotFoundError(f"no such task for this token; loaded for it: {known}") from None

    def line(self, tasks: Sequence[str], client: str, grant: Grant) -> str:
        """Return whose turn the work on a request takes: its task's, else its client's.

        Names that are made up share their client's turns: they must not become lines of their own.
        """
        name = split_reference(tasks[0])[0] if len(tasks) == 1 else ""
        if grant.covers(name) and name in self.session.tasks:
            return f"task {name}"
        return f"client {client}"

    async def off_loop(self, line: str, work: Callable[[], _T]) -> _T:
        """Do in the pool what would hold up the event loop.

        Raises:
            QueueFullError: Too much work waits.
        """
        return await self.pool.submit(line, work)

    async def classify(
        self,
        images: Sequence[bytes] | Sequence[Pixels],
        tasks: Sequence[str],
        *,
        grant: Grant,
        client: str = "",
        deadline_s: float | None = None,
    ) -> list[Classified]:
        """Ask every task about every image, in one go.

        Args:
            images: Encoded files, or pixels uint8 [H, W, 3] of the backbone's size.
            tasks: Names of loaded tasks.
            grant: What the request may do.
            client: Whose share of the budget decoding takes.
            deadline_s: Seconds from now after which the answer is of no use; None for the settings' default.

        Returns:
            Image by image, the tasks' answers in the order asked.

        Raises:
            InputError: There are no images or too many, or one cannot be used.
            ForbiddenError: The token is not good for asking tasks.
            TaskNotFoundError: A task is not loaded, or does not exist for the token.
            QueueFullError: There is too much work already.
            DeadlineExceededError: The deadline passed.
            ShuttingDownError: The service is closing.
            BackendError: The runtime failed.
        """
        rows = [(index, task) for index in range(len(images)) for task in tasks]
        return await self.ask(images, rows, grant=grant, client=client, deadline_s=deadline_s)

    async def ask(
        self,
        images: Sequence[bytes] | Sequence[Pixels],
        rows: Sequence[tuple[int, str]],
        *,
        grant: Grant,
        client: str = "",
        deadline_s: float | None = None,
        priority: int = NORMAL_PRIORITY,
    ) -> list[Classified]:
        """Put images to tasks, in one go; see ``classify``.

        Args:
            images: Encoded files, or pixels uint8 [H, W, 3] of the backbone's size.
            rows: The index of an image and the task to ask about it, for each answer.
            grant: What the request may do.
            client: Whose share of the budget decoding takes.
            deadline_s: Seconds from now after which the answer is of no use; None for the settings' default.
            priority: The level of the images within their tasks, from 1, which goes first.

        Returns:
            The answers, row by row.
        """
        limit = self.settings.max_images
        if not 1 <= len(rows) <= limit:
            raise InputError(f"a request asks for 1 to {limit} answers (images times tasks), found {len(rows)}")
        grant.require(Scope.INFER)
        tasks = list(dict.fromkeys(task for _, task in rows))
        served = [await self._loaded(name, client, grant) for name in tasks]
        models = [(task.card.name, task.version) for task in served]
        times = self.statistics.open(models)
        if (context := CURRENT_REQUEST.get()) is not None:
            context.times = times
        try:
            answers = await self._answers(
                images, rows, times, grant=grant, client=client, deadline_s=deadline_s, priority=priority
            )
        except BaseException as error:  # a cancellation, too
            self.statistics.fail(times, error)
            raise
        self.statistics.succeed(times)
        return answers

    async def _answers(
        self,
        images: Sequence[bytes] | Sequence[Pixels],
        rows: Sequence[tuple[int, str]],
        times: RequestTimes,
        *,
        grant: Grant,
        client: str,
        deadline_s: float | None,
        priority: int,
    ) -> list[Classified]:
        """Decode, queue and wait, and note the moments of it."""
        asked = [task for _, task in rows]
        if deadline_s is None and self.settings.batching.deadline_ms is not None:
            deadline_s = self.settings.batching.deadline_ms / 1000
        expires_at = None if deadline_s is None else time.monotonic() + deadline_s
        pixels = await self._pixels(
            images, asked, self.line(list(dict.fromkeys(asked)), client, grant), client, expires_at, times
        )
        queued = [(pixels[index], task) for index, task in rows]
        with self._as_seen_by(grant):
            try:
                answers = self.batcher.submit_all(queued, deadline_s=_remaining(expires_at), priority=priority)
            except TaskNotFoundError:  # perhaps a version that was served a moment ago, or was pushed out
                for task in dict.fromkeys(asked):
                    await self._loaded(task, client, grant)
                answers = self.batcher.submit_all(queued, deadline_s=_remaining(expires_at), priority=priority)
        times.answers = answers
        await _results(answers, expires_at)
        return [_classified(answer) for answer in answers]

    async def _pixels(
        self,
        images: Sequence[bytes] | Sequence[Pixels],
        asked: Sequence[str],
        line: str,
        client: str,
        expires_at: float | None,
        times: RequestTimes,
    ) -> list[Pixels]:
        """Decode those images that are files."""
        files = [image for image in images if isinstance(image, bytes)]
        if not files:
            return [image for image in images if not isinstance(image, bytes)]
        self.batcher.check_room(asked)  # before work is spent on them
        with self.budget.reserve(client) as reservation:
            reservation.grow(sum(map(len, files)))  # cut out of the body, they are held beside it

            def note(began_at: float, ended_at: float) -> None:
                times.decodings.append((began_at, ended_at))
                self.metrics.count_decoding(ended_at - began_at)

            decoding = self._decoder.submit(files, line=line, client=client, on_decoded=note)
            return await _results(decoding, expires_at)

    def _versions(self) -> set[tuple[str, int]]:
        """Return names and versions of the loaded tasks."""
        versions = set()
        for name in self.session.tasks:
            with contextlib.suppress(TaskNotFoundError):  # it has just been removed
                lease = self.session.lease(name)
                lease.release()
                versions.add((name, lease.version or 1))
        return versions

    def _count_batch(self, report: BatchReport) -> None:
        self.statistics.count_batch(report)
        self.metrics.count_batch(report)
        self.activity.count_batch(report)

    def require_administration(self) -> Administration:
        """Return what changes tasks.

        Raises:
            ForbiddenError: Clients may not change any.
        """
        if self.administration is None:
            raise ForbiddenError("the administration is off; start the server with --admin and a token for it")
        return self.administration

    def close(self, *, timeout_s: float | None = None) -> bool:
        """Finish what was accepted and stop every thread.

        Args:
            timeout_s: How long to wait for the threads, in s; None for as long as it takes.

        Returns:
            Whether all have ended. The session must not be closed while one of them uses it.
        """
        self.draining = True
        if self.administration is not None:
            self.administration.close()
        self.watchdog.stop()
        until = None if timeout_s is None else time.monotonic() + timeout_s
        batches_ended = self.batcher.close(drain=True, timeout_s=timeout_s)
        work_ended = self.pool.close(timeout_s=None if until is None else max(0.0, until - time.monotonic()))
        return batches_ended and work_ended

    def _loop_pulse(self) -> Pulse:
        return Pulse(is_busy=self._beats > 0, mark=self._beats, place="on the event loop")

    def _probe(self) -> None:
        """Run one black image, whatever comes of it: the batcher counts failures."""
        side = self.session.preprocessing.image_size
        with contextlib.suppress(VpdeployError):
            for task in self.session.tasks[:1]:
                self.batcher.submit(np.zeros((side, side, 3), np.uint8), task, deadline_s=_PROBE_DEADLINE_S)

    def _give_up(self, fault: str) -> None:
        """Refuse what waits and have the server end."""
        self.draining = True
        self.on_fault()
        self.batcher.abandon(_GIVEN_UP)
        self.pool.abandon(_GIVEN_UP)
        _log.critical("%s; everything that waits is refused and the server ends", fault)


def check_administration(settings: ServerSettings, access: Access) -> None:
    """Check that clients may change tasks only with a token that is good for it.

    Raises:
        SpecError: They may, and there is no such token.
    """
    if settings.administered is not None and not access.has_scope(Scope.ADMIN):
        raise SpecError(
            "the administration needs a token of its own; set VPDEPLOY_ADMIN_TOKEN, or give one in the token file "
            'scopes = ["admin"]'
        )


async def _results(futures: Sequence[Future[_T]] | Sequence[asyncio.Future[_T]], expires_at: float | None) -> list[_T]:
    """Wait for all results; what is left is cancelled when time is up, one fails, or the caller is cancelled."""
    loop = asyncio.get_running_loop()
    enough: asyncio.Future[bool] = loop.create_future()
    missing = len(futures)

    def count(future: Future[_T] | asyncio.Future[_T]) -> None:
        nonlocal missing
        missing -= 1
        if (missing == 0 or _failure(future) is not None) and not enough.done():
            enough.set_result(True)

    post = running_mailbox().post
    for future in futures:
        future.add_done_callback(count if isinstance(future, asyncio.Future) else partial(post, count))
    timer = None if expires_at is None else loop.call_later(max(0.0, expires_at - time.monotonic()), _give_up, enough)
    try:
        in_time = await enough
        for future in futures:
            if (error := _failure(future)) is not None:
                raise error
        if not in_time and not all(future.done() for future in futures):
            raise DeadlineExceededError("the deadline passed before the answer was ready")
        return [future.result() for future in futures]
    finally:
        if timer is not None:
            timer.cancel()
        for future in futures:
            future.cancel()


def _failure(future: Future[_T] | asyncio.Future[_T]) -> BaseException | None:
    """Return what a future failed of; None where it is not done, was cancelled or has a result."""
    return future.exception() if future.done() and not future.cancelled() else None


def _give_up(enough: asyncio.Future[bool]) -> None:
    if not enough.done():
        enough.set_result(False)


def _remaining(expires_at: float | None) -> float | None:
    return None if expires_at is None else max(0.0, expires_at - time.monotonic())


def _classified(answer: Answer) -> Classified:
    logits = answer.result()
    task = ServedTask(card=answer.card, version=answer.version or 1)
    if not np.isfinite(logits).all():
        raise BackendError(
            f"task '{task.card.name}' gave logits that are not finite; a float16 graph may overflow, export it "
            "with --bf16 or in float32"
        )
    return Classified(task=task, logits=logits)
