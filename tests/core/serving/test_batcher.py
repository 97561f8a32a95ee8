"""The batcher, driven by sessions that stop where the test wants them to."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait

import numpy as np
import pytest

from vpdeploy.errors import (
    BackendError,
    DeadlineExceededError,
    InputError,
    QueueFullError,
    ShuttingDownError,
    SpecError,
    TaskNotFoundError,
)
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy.format.task import BackboneId, TaskCard
from vpdeploy.serving.batch import BatchReport
from vpdeploy.serving.batcher import Batcher, BatchSettings

SIDE = 2
TIMEOUT_S = 30
TASKS = {"a": ("x", "y"), "b": ("x", "y", "z"), "c": ("only",)}
PREPROCESSING = Preprocessing(image_size=SIDE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
BACKBONE = BackboneId(name="toy", sha256="0" * 64, depth=1, width=3, heads=1, patch_size=1)


class FakeLease:
    def __init__(self, session: FakeSession, slot: int, card: TaskCard) -> None:
        self.session = session
        self.slot = slot
        self.card = card
        self.version: int | None = 7
        session.leases += 1

    def release(self) -> None:
        with self.session.lock:
            self.session.leases -= 1


class FakeSession:
    """Logits are ``slot * 1000 + first pixel + class``. With a gate, every batch waits for a permit."""

    def __init__(self, *, gated: bool = False) -> None:
        self.preprocessing = PREPROCESSING
        self.lock = threading.Lock()
        self.leases = 0
        self.batches: list[list[tuple[int, int]]] = []
        self.running = threading.Semaphore(0)
        self.permits = threading.Semaphore(0) if gated else None
        self.failures: list[Exception] = []

    def lease(self, task: str) -> FakeLease:
        if task not in TASKS:
            raise TaskNotFoundError(f"no task '{task}'")
        card = TaskCard(name=task, labels=TASKS[task], method="e2vpt", backbone=BACKBONE, preprocessing=PREPROCESSING)
        with self.lock:
            return FakeLease(self, list(TASKS).index(task), card)

    def run(self, images: np.ndarray, slots: np.ndarray) -> np.ndarray:
        self.batches.append([(int(slot), int(image[0, 0, 0])) for slot, image in zip(slots, images, strict=True)])
        self.running.release()
        if self.permits is not None:
            assert self.permits.acquire(timeout=TIMEOUT_S)
        if self.failures:
            raise self.failures.pop(0)
        base = slots.astype(np.float32) * 1000 + images[:, 0, 0, 0]
        return base[:, None] + np.arange(4, dtype=np.float32)

    def wait_until_running(self) -> None:
        assert self.running.acquire(timeout=TIMEOUT_S)

    def permit(self, batches: int = 1) -> None:
        self.permits.release(batches)


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def image(value: int = 0) -> np.ndarray:
    return np.full((SIDE, SIDE, 3), value, dtype=np.uint8)


def settings(**fields: object) -> BatchSettings:
    return BatchSettings(**{"max_batch_size": 4, "max_delay_ms": 0, **fields})


@pytest.fixture
def gated():
    """A session whose first batch, one image of task a, is running until it is permitted."""
    session = FakeSession(gated=True)
    with Batcher(session, settings(max_batch_size=16, max_queue_size=8)) as batcher:
        first = batcher.submit(image(), "a")
        session.wait_until_running()
        try:
            yield session, batcher, first
        finally:
            session.permit(100)


def test_an_answer_holds_the_logits_of_its_own_task_only():
    with Batcher(FakeSession()) as batcher:
        answers = [batcher.submit(image(5), task) for task in TASKS]
        logits = [answer.result(TIMEOUT_S) for answer in answers]
    assert [each.tolist() for each in logits] == [[5, 6], [1005, 1006, 1007], [2005]]
    assert all(each.dtype == np.float32 and each.base is None for each in logits)
    assert [answer.card.name for answer in answers] == list(TASKS)
    assert [answer.version for answer in answers] == [7, 7, 7]


def test_a_full_batch_does_not_wait_for_the_delay():
    session = FakeSession()
    with Batcher(session, settings(max_batch_size=3, max_delay_ms=60000)) as batcher:
        answers = batcher.submit_all([(image(index), "a") for index in range(3)])
        wait(answers, TIMEOUT_S)
        assert [len(batch) for batch in session.batches] == [3]


def test_a_batch_that_is_not_full_forms_after_the_delay():
    session = FakeSession()
    with Batcher(session, settings(max_batch_size=100, max_delay_ms=1)) as batcher:
        assert batcher.submit(image(3), "a").result(TIMEOUT_S).tolist() == [3, 4]


def test_one_batch_mixes_tasks(gated):
    session, batcher, first = gated
    answers = [batcher.submit(image(value), task) for value, task in enumerate(("a", "b", "c", "a"))]
    session.permit(2)
    wait([first, *answers], TIMEOUT_S)
    assert Counter(session.batches[1]) == Counter([(0, 0), (1, 1), (2, 2), (0, 3)])


def test_tasks_take_turns_under_overload():
    session = FakeSession()
    crowd, guests = [(image(value), "a") for value in range(6)], [(image(9), "b"), (image(9), "c")]
    with Batcher(session, settings(max_batch_size=4)) as batcher:
        wait(batcher.submit_all(crowd + guests), TIMEOUT_S)
    assert session.batches == [[(0, 0), (1, 9), (2, 9), (0, 1)], [(0, 2), (0, 3), (0, 4), (0, 5)]]


def test_a_full_batch_is_made_ready_while_another_runs():
    session = FakeSession(gated=True)
    with Batcher(session, settings(max_batch_size=2)) as batcher:
        first = batcher.submit(image(0), "a")
        session.wait_until_running()
        ready = batcher.submit_all([(image(1), "a"), (image(2), "b")])
        waiting = batcher.submit(image(3), "a")
        session.permit(2)
        assert [answer.result(TIMEOUT_S)[0] for answer in [first, *ready]] == [0, 1, 1002]
        session.permit(1)
        assert waiting.result(TIMEOUT_S)[0] == 3
    assert session.batches == [[(0, 0)], [(0, 1), (1, 2)], [(0, 3)]]


def test_all_batches_run_on_one_thread():
    session, threads = FakeSession(), set()
    run = session.run

    def noting(images: np.ndarray, slots: np.ndarray) -> np.ndarray:
        threads.add(threading.current_thread())
        return run(images, slots)

    session.run = noting
    with Batcher(session, settings(max_batch_size=2)) as batcher:
        wait(batcher.submit_all([(image(), "a")] * 20), TIMEOUT_S)
    assert len(session.batches) == 10
    assert len(threads) == 1


def test_an_unknown_task_raises_at_once_and_releases_the_leases_of_the_others():
    session = FakeSession()
    with Batcher(session) as batcher, pytest.raises(TaskNotFoundError, match="nowhere"):
        batcher.submit_all([(image(), "a"), (image(), "nowhere")])
    assert session.leases == 0
    assert session.batches == []


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((SIDE, SIDE, 3), np.float32),
        np.zeros((SIDE, SIDE + 1, 3), np.uint8),
        np.zeros((1, SIDE, SIDE, 3), np.uint8),
        np.zeros((SIDE, SIDE), np.uint8),
    ],
)
def test_an_image_of_another_shape_or_dtype_is_refused(bad):
    with Batcher(FakeSession()) as batcher, pytest.raises(InputError, match=r"uint8 \[2, 2, 3\], found"):
        batcher.submit(bad, "a")


def test_a_full_queue_refuses_at_once(gated):
    session, batcher, _ = gated
    batcher.submit_all([(image(), "a")] * 8)
    with pytest.raises(QueueFullError, match="8 images wait already"):
        batcher.submit(image(), "a")
    with pytest.raises(QueueFullError):
        batcher.check_room(["a"])
    assert session.leases == 2  # one for the running batch, one shared by the queued images


def test_a_task_below_its_share_finds_room_in_a_queue_that_another_filled(gated):
    _, batcher, _ = gated
    batcher.submit_all([(image(), "a")] * 8)
    batcher.submit_all([(image(), "b")] * 4)  # half of 8
    for task in ("a", "b"):
        with pytest.raises(QueueFullError, match="12 images wait already"):
            batcher.submit(image(), task)
    with pytest.raises(QueueFullError):
        batcher.submit_all([(image(), "c"), (image(), "a")])
    batcher.submit_all([(image(), "c")] * 2)  # a third of 8
    assert batcher.queue_length == 14


def test_a_request_is_admitted_whole_or_not_at_all(gated):
    _, batcher, _ = gated
    batcher.submit_all([(image(), "a")] * 6)
    with pytest.raises(QueueFullError):
        batcher.submit_all([(image(), "a")] * 3)
    assert batcher.queue_length == 6
    batcher.submit_all([(image(), "a")] * 2)
    assert batcher.queue_length == 8


def test_a_request_that_can_never_fit_is_an_input_error():
    with Batcher(FakeSession(), settings(max_queue_size=8)) as batcher, pytest.raises(InputError, match="split it"):
        batcher.submit_all([(image(), "a")] * 9)


def test_a_request_larger_than_a_batch_runs_in_several():
    session = FakeSession()
    with Batcher(session, settings(max_batch_size=4)) as batcher:
        answers = batcher.submit_all([(image(value), "a") for value in range(10)])
        assert [answer.result(TIMEOUT_S)[0] for answer in answers] == list(range(10))
    assert max(len(batch) for batch in session.batches) <= 4


def test_expired_images_fail_and_never_run():
    session, clock = FakeSession(gated=True), FakeClock()
    with Batcher(session, settings(), clock=clock) as batcher:
        first = batcher.submit(image(1), "a")
        session.wait_until_running()
        late = batcher.submit(image(2), "a", deadline_s=5)
        patient = batcher.submit(image(3), "a", deadline_s=20)
        endless = batcher.submit(image(4), "a")
        clock.now = 10
        session.permit(2)
        with pytest.raises(DeadlineExceededError):
            late.result(TIMEOUT_S)
        wait([first, patient, endless], TIMEOUT_S)
    assert session.batches == [[(0, 1)], [(0, 3), (0, 4)]]
    assert session.leases == 0


def test_the_default_deadline_holds_where_none_is_named():
    session, clock = FakeSession(gated=True), FakeClock()
    with Batcher(session, settings(deadline_ms=1000), clock=clock) as batcher:
        batcher.submit(image(1), "a")
        session.wait_until_running()
        late = batcher.submit(image(2), "a")
        clock.now = 2
        session.permit(1)
        with pytest.raises(DeadlineExceededError):
            late.result(TIMEOUT_S)


def test_expired_images_take_no_places_in_a_batch():
    session, clock = FakeSession(gated=True), FakeClock()
    with Batcher(session, settings(), clock=clock) as batcher:
        batcher.submit(image(), "a")
        session.wait_until_running()
        batcher.submit_all([(image(1), "a")] * 3, deadline_s=1)
        clock.now = 2
        live = batcher.submit_all([(image(2), "a")] * 4)
        session.permit(2)
        wait(live, TIMEOUT_S)
    assert session.batches[1:] == [[(0, 2)] * 4]


def test_cancelled_images_never_run_and_free_their_places_at_once(gated):
    session, batcher, first = gated
    answers = batcher.submit_all([(image(value), "a") for value in range(1, 9)])
    assert all(answer.cancel() for answer in answers[:7])
    assert batcher.queue_length == 1
    batcher.submit_all([(image(99), "b")] * 7)
    session.permit(4)
    assert answers[7].result(TIMEOUT_S)[0] == 8
    with pytest.raises(CancelledError):
        answers[0].result(TIMEOUT_S)
    first.result(TIMEOUT_S)
    values = [value for batch in session.batches for _, value in batch]
    assert not set(values) & set(range(1, 8))


def test_a_running_image_cannot_be_cancelled(gated):
    session, _, first = gated
    assert not first.cancel()
    session.permit()
    assert first.result(TIMEOUT_S).tolist() == [0, 1]


def test_the_lease_ends_when_the_last_image_of_a_request_is_done(gated):
    session, batcher, first = gated
    answers = batcher.submit_all([(image(), "b")] * 6)
    answers[0].cancel()
    assert session.leases == 2
    session.permit(1)
    first.result(TIMEOUT_S)
    assert session.leases == 1
    session.permit(10)
    wait(answers[1:], TIMEOUT_S)
    assert session.leases == 0


def test_a_failure_reaches_its_own_batch_only_and_the_thread_lives_on():
    session = FakeSession()
    session.failures = [RuntimeError("device lost"), BackendError("out of memory")]
    with Batcher(session, settings(max_batch_size=2, max_delay_ms=60000)) as batcher:
        for reason in ("RuntimeError: device lost", "out of memory"):
            failed = batcher.submit_all([(image(), "a"), (image(), "b")])
            for answer in failed:
                with pytest.raises(BackendError, match=reason):
                    answer.result(TIMEOUT_S)
            assert failed[0].exception() is not failed[1].exception()
        good = batcher.submit_all([(image(1), "a"), (image(2), "a")])
        assert [answer.result(TIMEOUT_S)[0] for answer in good] == [1, 2]
    assert session.leases == 0


@pytest.mark.parametrize("shape", [(0, 4), (2, 4), (1, 1), (4,), ()])
def test_a_session_that_answers_in_another_shape_fails_the_batch(shape):
    session = FakeSession()
    run, session.run = session.run, lambda images, slots: np.zeros(shape, np.float32)
    with Batcher(session, settings()) as batcher:
        with pytest.raises(BackendError, match="1 images with at least 2 logits"):
            batcher.submit(image(), "a").result(TIMEOUT_S)
        session.run = run
        assert batcher.submit(image(3), "a").result(TIMEOUT_S)[0] == 3


def test_closing_answers_what_was_accepted_and_refuses_more():
    session = FakeSession(gated=True)
    batcher = Batcher(session, settings(max_delay_ms=60000))
    queued = batcher.submit_all([(image(value), "a") for value in range(6)])
    session.wait_until_running()
    closing = threading.Thread(target=batcher.close)
    closing.start()
    session.permit(10)
    closing.join(TIMEOUT_S)
    assert [answer.result(0)[0] for answer in queued] == list(range(6))
    with pytest.raises(ShuttingDownError):
        batcher.submit(image(), "a")
    with pytest.raises(ShuttingDownError):
        batcher.check_room(["a"])
    batcher.close()
    assert session.leases == 0


def test_closing_without_draining_refuses_what_is_queued():
    session = FakeSession(gated=True)
    batcher = Batcher(session, settings(max_batch_size=16))
    running = batcher.submit(image(1), "a")
    session.wait_until_running()
    queued = batcher.submit_all([(image(), "a"), (image(), "b")])
    closing = threading.Thread(target=batcher.close, kwargs={"drain": False})
    closing.start()
    for answer in queued:
        with pytest.raises(ShuttingDownError):
            answer.result(TIMEOUT_S)
    session.permit(10)
    closing.join(TIMEOUT_S)
    assert running.result(0)[0] == 1
    assert session.leases == 0


def test_the_observer_is_told_of_every_batch_before_its_answers_are_given():
    clock, reports = FakeClock(), []
    session = FakeSession(gated=True)
    with Batcher(session, settings(), observer=reports.append, clock=clock) as batcher:
        first = batcher.submit(image(), "a")
        session.wait_until_running()
        clock.now = 1
        second = batcher.submit_all([(image(), "a"), (image(), "b"), (image(), "b")])
        clock.now = 4
        session.permit()
        first.result(TIMEOUT_S)
        session.wait_until_running()
        clock.now = 6
        session.permit()
        wait(second, TIMEOUT_S)
        assert reports == [
            BatchReport(
                images={"a": 1}, models=frozenset({("a", 7)}), queue_s=(0.0,), stack_s=0.0, run_s=4.0, ended_at=4.0
            ),
            BatchReport(
                images={"a": 1, "b": 2},
                models=frozenset({("a", 7), ("b", 7)}),
                queue_s=(3.0, 3.0, 3.0),
                stack_s=0.0,
                run_s=2.0,
                ended_at=6.0,
            ),
        ]


def test_a_failing_observer_does_not_stop_the_answers():
    def broken(report: BatchReport) -> None:
        raise RuntimeError("metrics are down")

    with Batcher(FakeSession(), settings(), observer=broken) as batcher:
        for value in range(3):
            assert batcher.submit(image(value), "a").result(TIMEOUT_S)[0] == value


@pytest.mark.parametrize(
    "fields",
    [
        {"max_batch_size": 0},
        {"max_queue_size": 0},
        {"max_delay_ms": -1},
        {"max_delay_ms": float("inf")},
        {"max_delay_ms": float("nan")},
        {"deadline_ms": 0},
        {"deadline_ms": float("nan")},
    ],
)
def test_settings_out_of_range_are_refused(fields):
    with pytest.raises(SpecError):
        BatchSettings(**fields)


def test_many_threads_each_get_their_own_answers():
    session = FakeSession()
    tasks = list(TASKS)

    def hammer(seed: int) -> int:
        rng = np.random.default_rng(seed)
        answered = 0
        for _ in range(100):
            rows = [(int(rng.integers(256)), tasks[rng.integers(3)]) for _ in range(rng.integers(1, 5))]
            answers = batcher.submit_all([(image(value), task) for value, task in rows])
            cancelled = {index for index, answer in enumerate(answers) if rng.random() < 0.2 and answer.cancel()}
            for index, (answer, (value, task)) in enumerate(zip(answers, rows, strict=True)):
                if index not in cancelled:
                    assert answer.result(TIMEOUT_S)[0] == tasks.index(task) * 1000 + value
                    assert len(answer.result()) == len(TASKS[task])
                    answered += 1
        return answered

    with (
        Batcher(session, settings(max_batch_size=8, max_delay_ms=0.1)) as batcher,
        ThreadPoolExecutor(12) as pool,
    ):
        answered = sum(pool.map(hammer, range(12)))
        assert batcher.queue_length == 0
    assert answered == sum(len(batch) for batch in session.batches)
    assert session.leases == 0
