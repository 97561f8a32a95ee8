from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from core import toy

import vpdeploy
from vpdeploy.backends import ort, providers
from vpdeploy.backends.description import RuntimeDescription
from vpdeploy.backends.native import backend as native
from vpdeploy.errors import (
    BackendError,
    BundleCorruptError,
    BundleError,
    InputError,
    LayoutMismatchError,
    SpecError,
    TaskNotFoundError,
)
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.bundle import Bundle, collect_leftovers, publish_task, withdraw_task
from vpdeploy.format.folded import FoldedCard
from vpdeploy.format.graphfacts import GraphFacts
from vpdeploy.format.layout import MASKED, Layout
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy.format.promptset import CompiledPromptSet
from vpdeploy.machine import gpu_obstacle
from vpdeploy.session.prediction import softmax
from vpdeploy.session.session import Session, load
from vpdeploy.session.slots import TaskDirectory
from vpdeploy.session.stream import MAX_PREDICT_BATCH
from vpdeploy.table import Table

Pixels = npt.NDArray[np.uint8]
Logits = npt.NDArray[np.float32]
MakePixels = Callable[..., Pixels]

TASKS = ("flowers", "birds", "probe")
CLASSES = {"flowers": 4, "birds": 7, "probe": 2}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def session(zoo: Path) -> Iterator[Session]:
    """A session that no test changes."""
    with load(zoo, threads=1) as session:
        yield session


@pytest.fixture
def live(zoo_copy: Path) -> Iterator[Session]:
    """A session, and a bundle below it, that the test may change."""
    with load(zoo_copy, threads=1) as session:
        yield session


def logits(session: Session, task: str, pixels: Pixels) -> Logits:
    """What one task says, its own classes only."""
    with session.lease(task) as lease:
        rows = session.run(pixels, np.full(len(pixels), lease.slot, np.int32))
        return rows[:, : len(lease.card.labels)]


def invented(zoo: Path, name: str, *, prefix: int = 3, classes: int = 3, seed: int = 0) -> CompiledPromptSet:
    """A random prompt set that fits the bundle's graph."""
    manifest = Bundle.open(zoo).manifest
    return toy.prompt_set(
        name,
        prefix=prefix,
        classes=classes,
        seed=seed,
        backbone=manifest.backbone,
        preprocessing=manifest.preprocessing,
        layout=manifest.layout,
    )


def alone(zoo: Path, prompt_set: CompiledPromptSet, pixels: Pixels) -> Logits:
    """What a prompt set says when nothing else is loaded."""
    with Session.of(Artifact.open(zoo).with_prompt_sets([prompt_set]), threads=1) as session:
        return logits(session, prompt_set.card.name, pixels)


# --- answers ---


def test_a_batch_that_mixes_tasks_equals_each_task_alone_in_any_order(
    session: Session, zoo: Path, random_pixels: MakePixels
):
    pixels = random_pixels(12)
    bundle = Bundle.open(zoo)
    expected = {task: alone(zoo, bundle.read_task(task), pixels) for task in TASKS}
    leases = {task: session.lease(task) for task in TASKS}
    rng = np.random.default_rng(3)
    for _ in range(3):
        order = rng.permutation(12)
        tasks = [TASKS[index] for index in rng.integers(0, 3, 12)]
        rows = session.run(pixels[order], np.array([leases[task].slot for task in tasks], np.int32))
        for position, (image, task) in enumerate(zip(order, tasks, strict=True)):
            found = rows[position]
            np.testing.assert_allclose(found[: CLASSES[task]], expected[task][image], **CLOSE)
            assert (found[CLASSES[task] :] < MASKED / 2).all()
    for lease in leases.values():
        lease.release()


def test_tasks_differ_so_that_a_mix_up_would_show(session: Session, random_pixels: MakePixels):
    pixels = random_pixels(4)
    flowers, birds = (logits(session, task, pixels)[:, :2] for task in ("flowers", "birds"))
    assert np.abs(flowers - birds).min() > 1e-3


def test_a_row_does_not_depend_on_its_batch(session: Session, random_pixels: MakePixels):
    pixels = random_pixels(5)
    together = logits(session, "birds", pixels)
    for index in range(5):
        np.testing.assert_allclose(logits(session, "birds", pixels[index : index + 1])[0], together[index], **CLOSE)


def test_padding_of_prefix_and_classes_changes_nothing(zoo: Path, random_pixels: MakePixels):
    pixels = random_pixels(4)
    bundle = Bundle.open(zoo)
    for task in TASKS:
        prompt_set = bundle.read_task(task)
        expected = alone(zoo, prompt_set, pixels)
        neighbour = invented(zoo, "neighbour", prefix=30, classes=11)
        with Session.of(Artifact.of_bundle(bundle).with_prompt_sets([prompt_set, neighbour]), threads=1) as wide:
            np.testing.assert_allclose(logits(wide, task, pixels), expected, **CLOSE)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 31, 32, 3), "uint8"), ((2, 3, 32, 32), "uint8"), ((32, 32, 3), "uint8"), ((2, 32, 32, 3), "float32")],
)
def test_images_of_another_shape_or_type_are_refused(session: Session, shape: tuple[int, ...], dtype: str):
    with pytest.raises(InputError, match=r"images should be uint8 \[B, 32, 32, 3\], found " + dtype):
        session.run(np.zeros(shape, dtype), np.zeros(shape[0], np.int32))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "slots",
    [
        np.array([0, 3], np.int32),
        np.array([-1, 0], np.int32),
        np.array([0], np.int32),
        np.zeros((2, 1), np.int32),
        np.array([0.5, 0.0]),
        np.array([0, 2**40]),
    ],
    ids=str,
)
def test_slots_that_do_not_exist_are_refused(session: Session, random_pixels: MakePixels, slots: Any):
    with pytest.raises(InputError, match=r"slots should be 2 integers in \[0, 3\)"):
        session.run(random_pixels(2), slots)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.uint64])
def test_slots_may_be_integers_of_any_width(session: Session, random_pixels: MakePixels, kind: type[np.integer[Any]]):
    pixels = random_pixels(2)
    expected = session.run(pixels, np.array([2, 0], np.int32))
    np.testing.assert_allclose(session.run(pixels, np.array([2, 0], kind)), expected, **CLOSE)


def test_an_empty_batch_has_an_empty_answer(session: Session, random_pixels: MakePixels):
    rows = session.run(random_pixels(0), np.zeros(0, np.int32))
    assert (rows.shape, rows.dtype) == ((0, 7), np.float32)
    assert session.predict([], "birds") == []


@pytest.mark.parametrize(("shape", "dtype"), [((0, 31, 32, 3), "uint8"), ((0, 32, 32, 3), "float32"), ((), "uint8")])
def test_what_is_no_batch_of_images_is_refused_even_without_rows(session: Session, shape: tuple[int, ...], dtype: str):
    with pytest.raises(InputError, match=r"images should be uint8 \[B, 32, 32, 3\], found " + dtype):
        session.run(np.zeros(shape, dtype), np.zeros(0, np.int32))  # type: ignore[arg-type]


def test_slots_without_images_are_refused(session: Session, random_pixels: MakePixels):
    with pytest.raises(InputError):
        session.run(random_pixels(0), np.zeros(1, np.int32))


def test_strided_pixels_are_read_by_value(session: Session, random_pixels: MakePixels):
    pixels = random_pixels(2)
    mirrored = pixels[:, :, ::-1]
    found = session.run(mirrored, np.zeros(2, np.int32))
    np.testing.assert_array_equal(found, session.run(mirrored.copy(), np.zeros(2, np.int32)))


# --- predict ---


def test_predict_takes_paths_bytes_pillow_images_and_arrays(
    session: Session, tmp_path: Path, random_pixels: MakePixels
):
    pillow = pytest.importorskip("PIL.Image", reason="needs Pillow")
    pixels = random_pixels(1)[0]
    picture = pillow.fromarray(pixels)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    path = tmp_path / "image.png"
    path.write_bytes(buffer.getvalue())
    answers = session.predict([path, str(path), buffer.getvalue(), picture, pixels], "flowers")
    expected = softmax(logits(session, "flowers", pixels[None]))[0]
    for answer in answers:
        assert answer.task == "flowers"
        assert [each.label for each in answer.ranking] == [f"flowers-{each.index}" for each in answer.ranking]
        for each in answer.ranking:
            assert each.probability == pytest.approx(float(expected[each.index]), abs=1e-6)
        probabilities = [each.probability for each in answer.ranking]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
    (alone,) = session.predict(path, "flowers")
    assert [(each.label, each.index) for each in alone.ranking] == [
        (each.label, each.index) for each in answers[0].ranking
    ]
    assert [each.probability for each in alone.ranking] == pytest.approx(
        [each.probability for each in answers[0].ranking], abs=1e-6
    )


def test_predict_takes_one_batch_array_of_any_length(session: Session, random_pixels: MakePixels):
    pixels = random_pixels(MAX_PREDICT_BATCH + 3)
    answers = session.predict(pixels, "birds", top=1)
    expected = logits(session, "birds", pixels[:, :]).argmax(1)
    assert [answer.ranking[0].index for answer in answers] == expected.tolist()
    assert all(len(answer.ranking) == 1 for answer in answers)


def test_a_stream_takes_two_batches_of_what_may_never_end(session: Session, random_pixels: MakePixels):
    pixels = random_pixels(5)
    taken = itertools.count()

    def endless() -> Iterator[Pixels]:
        while True:
            yield pixels[next(taken) % 5]

    expected = logits(session, "birds", pixels).argmax(1)
    with contextlib.closing(session.stream(endless(), "birds", top=1)) as stream:
        for place, (picture, answer) in enumerate(itertools.islice(stream, 3 * MAX_PREDICT_BATCH)):
            assert not isinstance(answer, InputError)
            assert answer.ranking[0].index == expected[place % 5]
            assert np.array_equal(picture, pixels[place % 5])
    # Three batches were answered, one more was being decoded.
    assert next(taken) <= 5 * MAX_PREDICT_BATCH


def test_a_stream_gives_the_error_of_a_picture_in_its_place_and_goes_on(session: Session, random_pixels: MakePixels):
    good = random_pixels(1)[0]
    pictures = [good, b"not an image", *[good] * MAX_PREDICT_BATCH, "none.png", good]
    found = [answer for _, answer in session.stream(iter(pictures), "birds")]
    wrong = {place: str(answer) for place, answer in enumerate(found) if isinstance(answer, InputError)}
    assert len(found) == len(pictures)
    assert list(wrong) == [1, MAX_PREDICT_BATCH + 2]
    assert wrong[1].startswith("image: not a readable image")
    assert wrong[MAX_PREDICT_BATCH + 2] == "none.png: file not found"


def test_a_stream_of_pictures_that_cannot_be_read_runs_nothing(session: Session, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(session, "run", None)
    assert all(isinstance(answer, InputError) for _, answer in session.stream([b"", b"x"], "birds"))
    assert list(session.stream([], "birds")) == []


def test_a_stream_holds_its_task_until_it_is_closed(live: Session, random_pixels: MakePixels):
    stream = live.stream([random_pixels(1)[0]] * 99, "birds")
    next(stream)
    live.remove_task("birds")
    with pytest.raises(TaskNotFoundError):
        live.predict(random_pixels(1), "birds")
    assert not isinstance(next(stream)[1], InputError)
    free = live._directory._free
    assert not free
    stream.close()
    assert len(free) == 1


@pytest.mark.parametrize("as_path", [str, Path])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("photos", "photos: is a folder; name the images in it"),
        ("https://example.org/a.jpg", "https://example.org/a.jpg: is a URL; download it first (curl -O)"),
        ("photos/pipe.jpg", "photos/pipe.jpg: is a pipe, not a file"),
        ("photos/none.jpg", "photos/none.jpg: file not found"),
    ],
)
def test_predict_says_what_a_path_that_is_no_file_is(
    session: Session,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    as_path: Callable[[str], str | Path],
    name: str,
    message: str,
):
    pytest.importorskip("PIL", reason="needs Pillow")
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    os.mkfifo("photos/pipe.jpg")
    with pytest.raises(InputError, match=re.escape(message)):
        session.predict([as_path(name)], "birds")


def test_predict_resizes_arrays_of_another_size(session: Session, random_pixels: MakePixels):
    pytest.importorskip("PIL", reason="needs Pillow")
    pixels = random_pixels(1)[0]
    enlarged = pixels.repeat(2, axis=0).repeat(2, axis=1)
    assert session.predict(enlarged, "birds")[0].label == session.predict(pixels, "birds")[0].label


def test_predict_needs_a_task_where_there_are_several(session: Session, random_pixels: MakePixels):
    with pytest.raises(SpecError, match="several tasks are loaded, name one of: flowers, birds, probe"):
        session.predict(random_pixels(1))
    with pytest.raises(TaskNotFoundError, match="no task 'fish'; loaded: flowers, birds, probe"):
        session.predict(random_pixels(1), "fish")


@pytest.mark.parametrize(
    "picture",
    [
        b"not an image",
        Path("/nowhere.png"),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 3)),
        np.zeros((0, 4, 3), np.uint8),
    ],
    ids=["bytes", "path", "grey", "float", "empty"],
)
def test_a_picture_that_cannot_be_used_is_an_input_error(session: Session, picture: Any):
    with pytest.raises(InputError):
        session.predict([picture], "flowers")


# --- changes while loaded ---


def test_a_task_added_live_answers_as_it_does_alone(live: Session, zoo_copy: Path, random_pixels: MakePixels):
    pixels = random_pixels(3)
    before = {task: logits(live, task, pixels) for task in TASKS}
    for prefix, classes in ((3, 2), (16, 7), (17, 9), (0, 1)):  # the table grows in slots, prefix and classes
        name = f"new-{prefix}"
        prompt_set = invented(zoo_copy, name, prefix=prefix, classes=classes, seed=prefix)
        live.add_task(prompt_set)
        before[name] = alone(zoo_copy, prompt_set, pixels)
        for task, expected in before.items():
            np.testing.assert_allclose(logits(live, task, pixels), expected, **CLOSE)
    assert live.tasks == (*TASKS, "new-3", "new-16", "new-17", "new-0")


def test_a_removed_task_is_unknown_and_the_others_stay(live: Session, random_pixels: MakePixels):
    pixels = random_pixels(2)
    expected = logits(live, "probe", pixels)
    live.remove_task("flowers")
    assert live.tasks == ("birds", "probe")
    with pytest.raises(TaskNotFoundError, match="no task 'flowers'"):
        live.lease("flowers")
    np.testing.assert_allclose(logits(live, "probe", pixels), expected, **CLOSE)


def test_a_request_under_way_keeps_the_version_it_started_with(
    live: Session, zoo_copy: Path, random_pixels: MakePixels
):
    pixels = random_pixels(2)
    expected = logits(live, "flowers", pixels)
    with live.lease("flowers") as lease:
        live.add_task(invented(zoo_copy, "flowers", classes=4, seed=1), version=2)
        live.add_task(invented(zoo_copy, "filler", seed=2))
        live.remove_task("flowers")
        live.add_task(invented(zoo_copy, "filler", seed=3))
        rows = live.run(pixels, np.full(2, lease.slot, np.int32))[:, :4]
    np.testing.assert_allclose(rows, expected, **CLOSE)


def test_slots_of_removed_tasks_are_used_again(live: Session, zoo_copy: Path):
    slots = live.describe().slots
    for index in range(10):
        live.remove_task(live.tasks[0])
        live.add_task(invented(zoo_copy, f"new-{index}", prefix=2, classes=2))
    assert live.describe().slots == slots


def test_replacing_a_task_again_and_again_needs_one_more_slot_only(live: Session, zoo_copy: Path):
    slots = live.describe().slots
    for index in range(10):
        live.add_task(invented(zoo_copy, "flowers", classes=2, seed=index), version=index)
    assert live.describe().slots == slots + 1


def test_no_slot_is_lost_when_one_is_freed_while_the_table_grows(
    live: Session, zoo_copy: Path, monkeypatch: pytest.MonkeyPatch
):
    lease = live.lease("probe")
    live.remove_task("probe")
    was_full = TaskDirectory.is_full.fget
    assert was_full is not None

    def is_full(directory: TaskDirectory) -> bool:
        answer = bool(was_full(directory))
        lease.release()  # by another thread, just after the question
        return answer

    monkeypatch.setattr(TaskDirectory, "is_full", property(is_full))
    live.add_task(invented(zoo_copy, "first", prefix=2, classes=2))
    monkeypatch.undo()
    slots = live.describe().slots
    for index in range(slots - len(live.tasks)):
        live.add_task(invented(zoo_copy, f"more-{index}", prefix=2, classes=2))
    assert len(live.tasks) == live.describe().slots == slots


def test_a_prompt_set_that_does_not_fit_is_refused_and_nothing_changes(live: Session, zoo_copy: Path):
    stranger = invented(zoo_copy, "stranger")
    other = replace(stranger.card.backbone, sha256="0" * 64)
    with pytest.raises(LayoutMismatchError, match="'stranger' belongs to backbone"):
        live.add_task(replace(stranger, card=replace(stranger.card, backbone=other)))
    broken = {**stranger.tensors, "head_bias": np.full(3, np.nan, np.float32)}
    with pytest.raises(LayoutMismatchError, match="not finite"):
        live.add_task(replace(stranger, tensors=broken))
    assert live.tasks == TASKS


def test_a_device_that_is_full_leaves_what_is_loaded(
    live: Session, zoo_copy: Path, random_pixels: MakePixels, monkeypatch: pytest.MonkeyPatch
):
    pixels = random_pixels(2)
    expected = {task: logits(live, task, pixels) for task in TASKS}

    def refuse(*_: object) -> None:
        raise BackendError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(ort.OrtBackend, "bind_table", refuse)
        for _ in range(2):
            with pytest.raises(BackendError, match="out of memory"):
                live.add_task(invented(zoo_copy, "new"))
    for task in TASKS:
        np.testing.assert_allclose(logits(live, task, pixels), expected[task], **CLOSE)
    live.add_task(invented(zoo_copy, "new"))
    assert live.tasks == (*TASKS, "new")
    assert live.describe().slots == 4


def test_a_slot_is_given_back_when_it_cannot_be_brought_to_the_device(
    live: Session, zoo_copy: Path, monkeypatch: pytest.MonkeyPatch
):
    live.remove_task("probe")

    def refuse(*_: object) -> None:
        raise BackendError("copy failed")

    with monkeypatch.context() as patched:
        patched.setattr(ort.OrtBackend, "refresh_slot", refuse)
        with pytest.raises(BackendError, match="copy failed"):
            live.add_task(invented(zoo_copy, "new", prefix=2, classes=2))
    live.add_task(invented(zoo_copy, "new", prefix=2, classes=2))
    assert live.describe().slots == 3


def test_runs_from_threads_stay_right_while_tasks_come_and_go(live: Session, zoo_copy: Path, random_pixels: MakePixels):
    pixels = random_pixels(2)
    versions = {number: invented(zoo_copy, "moving", prefix=1 + number, seed=number) for number in range(8)}
    expected = {version: alone(zoo_copy, prompt_set, pixels) for version, prompt_set in versions.items()}
    steady = logits(live, "flowers", pixels)
    live.add_task(versions[0], version=0)
    done = threading.Event()
    failures: list[BaseException] = []
    runs = [0] * 3

    def ask(thread: int) -> None:
        try:
            while not done.is_set() or runs[thread] < 5:
                runs[thread] += 1
                with live.lease("moving") as moving, live.lease("flowers") as flowers:
                    slots = np.array([moving.slot, flowers.slot], np.int32)
                    rows = live.run(pixels, slots)
                    assert moving.version is not None
                    np.testing.assert_allclose(rows[0, :3], expected[moving.version][0], **CLOSE)
                    np.testing.assert_allclose(rows[1, :4], steady[1], **CLOSE)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        for step in range(40):
            live.add_task(versions[step % 8], version=step % 8)
            live.add_task(invented(zoo_copy, f"passing-{step}", prefix=step % 20, classes=1 + step % 9, seed=step))
            if step > 2:
                live.remove_task(f"passing-{step - 2}")
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert min(runs) >= 5


class HeldTable:
    """A backend that only holds the table."""

    name = "held"
    metadata: dict[str, str] = {}  # noqa: RUF012
    input_dtype = np.dtype(np.uint8)
    table: Table | None = None

    def bind_table(self, table: Table) -> None:
        self.table = table

    def refresh_slot(self, slot: int) -> None:
        pass

    def run(self, images: Any, slots: Any) -> Any:
        raise NotImplementedError

    def describe(self) -> RuntimeDescription:
        return RuntimeDescription(name="held", version="1", reason="asked for", threads=None)

    def close(self) -> None:
        pass


def test_one_more_task_costs_little_more_than_its_compiled_bytes(tmp_path: Path):
    backbone = replace(toy.BACKBONE, depth=4, heads=4, width=64)
    layout = Layout.for_backbone(backbone, dtype="float32")
    sets = [
        toy.prompt_set(f"task-{number}", prefix=15, classes=2, backbone=backbone, layout=layout)
        for number in range(100)
    ]
    compiled = sets[0].size_bytes
    facts = toy.facts(backbone=backbone, layout=layout)
    session = Session(Artifact.of_staged(tmp_path / "model.onnx", facts, sets[:20]), HeldTable())
    start = session.describe().table_bytes
    for number, each in enumerate(sets[20:], start=21):
        session.add_task(each)
        assert session.describe().table_bytes / (number * compiled) <= 1.1
    assert (session.describe().table_bytes - start) / (80 * compiled) <= 1.1


def test_a_graph_whose_tasks_cannot_be_loaded_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Full(HeldTable):
        closed = False

        def bind_table(self, table: Any) -> None:
            raise BackendError("the table cannot be bound")

        def close(self) -> None:
            self.closed = True

    backend = Full()
    monkeypatch.setattr("vpdeploy.session.session.open_backend", lambda *_, **__: backend)
    with pytest.raises(BackendError, match="cannot be bound"):
        Session.of(Artifact.open(toy.write(tmp_path / "zoo").path))
    assert backend.closed


# --- following a bundle on disk ---


def test_sync_follows_what_was_added_updated_and_removed(live: Session, zoo_copy: Path, random_pixels: MakePixels):
    pixels = random_pixels(2)
    assert not live.sync()
    birds = logits(live, "birds", pixels)
    publish_task(zoo_copy, invented(zoo_copy, "new", seed=1))
    publish_task(zoo_copy, invented(zoo_copy, "flowers", seed=2))
    withdraw_task(zoo_copy, "probe")
    report = live.sync()
    assert (report.added, report.updated, report.removed) == (("new",), ("flowers",), ("probe",))
    assert set(live.tasks) == {"flowers", "birds", "new"}
    for name, seed in (("new", 1), ("flowers", 2)):
        expected = alone(zoo_copy, invented(zoo_copy, name, seed=seed), pixels)
        np.testing.assert_allclose(logits(live, name, pixels), expected, **CLOSE)
    np.testing.assert_allclose(logits(live, "birds", pixels), birds, **CLOSE)
    assert not live.sync()


def test_sync_notices_a_task_that_was_removed_and_published_anew(
    live: Session, zoo_copy: Path, random_pixels: MakePixels
):
    pixels = random_pixels(2)
    for version in (2, 3):
        withdraw_task(zoo_copy, "probe")
        prompt_set = invented(zoo_copy, "probe", seed=version)
        assert publish_task(zoo_copy, prompt_set) == version
        assert live.sync().updated == ("probe",)
        np.testing.assert_allclose(logits(live, "probe", pixels), alone(zoo_copy, prompt_set, pixels), **CLOSE)
        assert not live.sync()


def test_sync_notices_a_bundle_that_was_copied_over_and_serves_another_prompt_set_in_the_version_that_is_loaded(
    live: Session, zoo_copy: Path, tmp_path: Path, random_pixels: MakePixels
):
    pixels = random_pixels(2)
    other = Path(shutil.copytree(zoo_copy, tmp_path / "other"))
    for path, seed in ((zoo_copy, 1), (other, 2)):
        assert publish_task(path, invented(path, "probe", seed=seed)) == 2
    assert live.sync().updated == ("probe",)
    with live.lease("probe") as old:
        shutil.copytree(other, zoo_copy, dirs_exist_ok=True)
        assert live.sync().updated == ("probe",)
        with live.lease("probe") as new:
            assert (old.version, new.version) == (2, 2)
            assert new.generation > old.generation
    expected = alone(zoo_copy, invented(zoo_copy, "probe", seed=2), pixels)
    np.testing.assert_allclose(logits(live, "probe", pixels), expected, **CLOSE)


def test_sync_with_a_damaged_version_leaves_what_is_loaded(live: Session, zoo_copy: Path, random_pixels: MakePixels):
    pixels = random_pixels(2)
    expected = {task: logits(live, task, pixels) for task in TASKS}
    version = publish_task(zoo_copy, invented(zoo_copy, "flowers", seed=2))
    damaged = zoo_copy / "tasks/flowers" / str(version) / "prompts.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    report = live.sync()
    assert not report
    assert "flowers/2/prompts.safetensors" in report.failed["flowers"]
    assert live.failures == report.failed
    for task in TASKS:
        np.testing.assert_allclose(logits(live, task, pixels), expected[task], **CLOSE)
    publish_task(zoo_copy, invented(zoo_copy, "flowers", seed=2))
    assert live.sync().updated == ("flowers",)
    assert not live.failures


def test_a_damaged_task_keeps_no_other_from_being_followed_and_is_loaded_once_it_is_whole(
    live: Session, zoo_copy: Path, random_pixels: MakePixels
):
    damaged = zoo_copy / "tasks/new/1/prompts.safetensors"
    publish_task(zoo_copy, invented(zoo_copy, "new", seed=1))
    publish_task(zoo_copy, invented(zoo_copy, "flowers", seed=2))
    withdraw_task(zoo_copy, "probe")
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    report = live.sync()
    assert (report.added, report.updated, report.removed) == ((), ("flowers",), ("probe",))
    assert list(report.failed) == ["new"]
    with pytest.raises(TaskNotFoundError, match="task 'new' is damaged and not loaded"):
        live.lease("new")
    damaged.write_bytes(whole)
    assert live.sync().added == ("new",)
    assert len(logits(live, "new", random_pixels(1))) == 1


def test_a_task_that_finds_no_room_on_the_device_keeps_no_other_from_being_followed(
    live: Session, zoo_copy: Path, monkeypatch: pytest.MonkeyPatch
):
    publish_task(zoo_copy, invented(zoo_copy, "flowers", seed=2))
    withdraw_task(zoo_copy, "probe")

    def full(*_: object, **__: object) -> None:
        raise BackendError("the device is full")

    with monkeypatch.context() as patched:
        patched.setattr(live, "add_task", full)
        report = live.sync()
    assert (report.removed, report.failed) == (("probe",), {"flowers": "the device is full"})
    assert live.sync().updated == ("flowers",)


@pytest.mark.skipif(sys.platform != "linux", reason="holds are locks that Linux has")
def test_what_a_session_serves_stays_on_the_disk_until_the_last_request_of_it_is_answered(
    live: Session, zoo_copy: Path
):
    served = zoo_copy / "tasks/probe/1"
    lease = live.lease("probe")
    withdraw_task(zoo_copy, "probe")
    assert served.exists()
    live.sync()
    assert [each.is_held for each in collect_leftovers(zoo_copy)] == [True]
    lease.release()
    assert [each.is_held for each in collect_leftovers(zoo_copy)] == [False]
    assert not served.exists()
    withdraw_task(zoo_copy, "birds")
    assert [each.is_held for each in collect_leftovers(zoo_copy)] == [True]
    live.close()
    assert [each.is_held for each in collect_leftovers(zoo_copy)] == [False]


@pytest.mark.parametrize("damage", ["", "{", None])
def test_sync_with_a_damaged_manifest_leaves_what_is_loaded(live: Session, zoo_copy: Path, damage: str | None):
    if damage is None:
        (zoo_copy / "manifest.json").unlink()
    else:
        (zoo_copy / "manifest.json").write_text(damage)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        live.sync()
    assert live.tasks == TASKS


def test_sync_refuses_another_graph(live: Session, zoo_copy: Path):
    fields = json.loads((zoo_copy / "manifest.json").read_text())
    fields["graph"]["sha256"] = "0" * 64
    (zoo_copy / "manifest.json").write_text(json.dumps(fields))
    with pytest.raises(BundleError, match="the graph was replaced; restart to serve it"):
        live.sync()
    assert live.tasks == TASKS


def test_a_bundle_without_tasks_can_be_opened_and_filled(zoo_copy: Path, random_pixels: MakePixels):
    pixels = random_pixels(2)
    prompt_set = invented(zoo_copy, "first")
    for task in TASKS:
        withdraw_task(zoo_copy, task)
    with load(zoo_copy, threads=1) as session:
        assert session.tasks == ()
        with pytest.raises(TaskNotFoundError, match="loaded: none"):
            session.predict(pixels, "first")
        with pytest.raises(SpecError, match="no task is loaded"):
            session.predict(pixels)
        publish_task(zoo_copy, prompt_set)
        assert session.sync().added == ("first",)
        np.testing.assert_allclose(logits(session, "first", pixels), alone(zoo_copy, prompt_set, pixels), **CLOSE)


# --- opening ---


def test_a_bundle_with_a_damaged_task_is_opened_for_the_others_where_that_is_asked_for(
    zoo_copy: Path, random_pixels: MakePixels
):
    (zoo_copy / "tasks/birds/1/task.json").write_text("{")
    with pytest.raises(BundleCorruptError, match=r"birds/1/task\.json"):
        load(zoo_copy, threads=1)
    with load(zoo_copy, threads=1, strict=False) as session:
        assert session.tasks == ("flowers", "probe")
        assert list(session.failures) == ["birds"]
        pixels = random_pixels(1)
        expected = alone(zoo_copy, Bundle.open(zoo_copy).read_task("probe"), pixels)
        np.testing.assert_allclose(logits(session, "probe", pixels), expected, **CLOSE)
    for task in ("flowers", "probe"):
        (zoo_copy / f"tasks/{task}/1/prompts.safetensors").unlink()
    with pytest.raises(BundleCorruptError, match="flowers"):
        load(zoo_copy, threads=1, strict=False)


def test_what_is_neither_bundle_nor_model_is_refused(tmp_path: Path):
    (tmp_path / "note.txt").write_text("hello")
    (tmp_path / "bad.onnx").write_bytes(b"hello")
    for name, message in (
        ("none", "does not exist; expected a bundle folder or an .onnx file"),
        (".", "is neither; expected a bundle folder or an .onnx file"),
        ("note.txt", "not an .onnx file"),
    ):
        with pytest.raises(BundleError, match=message):
            load(tmp_path / name)
    with pytest.raises(BundleError, match=r"bad\.onnx: not an ONNX file, or truncated"):
        load(tmp_path / "bad.onnx")


def test_a_tampered_graph_is_not_loaded(zoo_copy: Path):
    data = bytearray((zoo_copy / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (zoo_copy / "model.onnx").write_bytes(bytes(data))
    with pytest.raises(BundleCorruptError, match=r"model\.onnx: contents do not match"):
        load(zoo_copy)


def test_an_unknown_runtime_is_refused_with_the_known_ones(zoo: Path):
    with pytest.raises(
        SpecError, match="unknown runtime 'onnx'; choose one of: auto, tensorrt, tensorrt-rtx, onnxruntime"
    ):
        load(zoo, runtime="onnx")


def test_cuda_that_was_asked_for_is_never_replaced_by_the_cpu(zoo: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(providers, "gpu_obstacle", lambda: "no NVIDIA driver")
    with pytest.raises(BackendError, match="runtime 'onnxruntime-cuda' does not work here: no NVIDIA driver"):
        load(zoo, runtime="onnxruntime-cuda")


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider' is not in available:UserWarning")
def test_a_provider_that_does_not_start_is_never_replaced_by_the_cpu(zoo: Path):
    if gpu_obstacle() is None:
        pytest.skip("a GPU is here")
    with pytest.raises(BackendError, match="CUDA"):
        ort.OrtBackend(zoo / "model.onnx", provider=ort.CUDA_PROVIDER, threads=1, reason="asked for")


def test_auto_says_what_it_chose_and_why(zoo: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(providers, "gpu_obstacle", lambda: "no NVIDIA driver")
    monkeypatch.setattr(native, "gpu_obstacle", lambda: "no NVIDIA driver")
    monkeypatch.setattr(native, "find_gpu", lambda: None)
    with load(zoo) as session:
        described = session.describe()
    assert described.runtime.name == "onnxruntime-cpu"
    faster = "tensorrt, tensorrt-rtx, onnxruntime-cuda"
    assert described.runtime.reason == f"{faster}: no NVIDIA driver; fastest that works here"


def test_a_session_describes_its_table(session: Session):
    described = session.describe()
    depth, width, prefix, classes = 3, 48, 10, 7  # the longest task has 10 columns
    numbers = 2 * depth * width * prefix + depth * prefix + width * classes + classes
    assert described.slots == 3
    assert described.slot_bytes == 4 * numbers
    assert described.table_bytes == 3 * 4 * numbers
    assert (described.precision, described.image_size, described.runtime.threads) == ("fp32", 32, 1)


def test_load_is_what_the_package_gives():
    assert vpdeploy.load is load
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vpdeploy.nothing


def test_a_closed_session_refuses_to_run(zoo: Path, random_pixels: MakePixels):
    with load(zoo) as session:
        pass
    with pytest.raises(BackendError):
        session.run(random_pixels(1), np.zeros(1, np.int32))


# --- folded models ---


def test_a_folded_model_answers_without_a_task_name(folded_flowers: Path, random_pixels: MakePixels):
    pixels = random_pixels(3)
    with load(folded_flowers, threads=1) as session:
        assert session.tasks == ("flowers",)
        assert session.predict(pixels) == session.predict(pixels, "flowers")
        assert session.run(pixels, np.zeros(3, np.int32)).shape == (3, 4)
        assert session.run(random_pixels(0), np.zeros(0, np.int32)).shape == (0, 4)
        with pytest.raises(InputError, match=r"\[0, 1\)"):
            session.run(pixels, np.ones(3, np.int32))
        with pytest.raises(TaskNotFoundError, match="no task 'birds'; loaded: flowers"):
            session.predict(pixels, "birds")


def test_a_folded_model_holds_one_task_and_follows_nothing(folded_flowers: Path, zoo: Path):
    with load(folded_flowers, threads=1) as session:
        with pytest.raises(SpecError, match="a folded model holds one task"):
            session.add_task(invented(zoo, "new"))
        assert not session.sync()
        assert session.describe().slots == 1


def test_a_bundles_graph_alone_is_no_folded_model(zoo: Path):
    with pytest.raises(BundleError, match=r"model\.onnx: no vpdeploy metadata"):
        load(zoo / "model.onnx")


def test_float_input_is_normalised_as_the_graph_would(tmp_path: Path):
    """Sessions over graphs that take float pixels normalise: (u / 255 - mean) / std, channels first."""

    class FloatBackend(HeldTable):
        input_dtype = np.dtype(np.float32)

        def run(self, images: Any, slots: Any) -> Any:
            assert slots is None
            self.received = images
            return np.zeros((len(images), 4), np.float32)

    preprocessing = Preprocessing(image_size=8, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    backend = FloatBackend()
    card = replace(toy.prompt_set().card, preprocessing=preprocessing)
    folded = FoldedCard(task=card, graph=GraphFacts(precision="fp32", opset=20, image_input="float"))
    session = Session(Artifact.of_folded(tmp_path / "task.onnx", folded), backend)
    pixels = np.zeros((1, 8, 8, 3), np.uint8)
    pixels[0, 2, 5] = (255, 51, 102)
    session.run(pixels, np.zeros(1, np.int32))
    assert backend.received.shape == (1, 3, 8, 8)
    assert backend.received.flags.c_contiguous
    np.testing.assert_allclose(backend.received[0, :, 2, 5], [1.0, -0.2, 0.4], atol=1e-6)
    np.testing.assert_allclose(backend.received[0, :, 0, 0], [-1.0, -1.0, 0.0], atol=1e-6)
    with pytest.raises(InputError, match=r"images should be uint8 \[B, 8, 8, 3\], found float32"):
        session.run(backend.received, np.zeros(1, np.int32))  # normalised already
