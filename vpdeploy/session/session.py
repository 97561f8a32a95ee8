"""A session: images and task names in, logits or labels out."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vpdeploy.backends import AUTO, open_backend
from vpdeploy.backends.checks import check_images, check_slots
from vpdeploy.backends.description import RuntimeDescription
from vpdeploy.backends.protocol import Backend
from vpdeploy.errors import (
    BundleCorruptError,
    BundleError,
    InputError,
    SpecError,
    TaskNotFoundError,
    VpdeployError,
)
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.bundle import Bundle, read_consistently
from vpdeploy.format.graphfacts import Precision
from vpdeploy.format.holds import Holds, graph_name, version_name
from vpdeploy.format.manifest import TaskEntry
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy.format.promptset import CompiledPromptSet
from vpdeploy.format.task import TaskCard, split_reference
from vpdeploy.image import normalise, to_pixels
from vpdeploy.session.prediction import Prediction
from vpdeploy.session.slots import Lease, TaskDirectory
from vpdeploy.session.stream import answer_each
from vpdeploy.table import Table, common_sizes

if TYPE_CHECKING:
    from vpdeploy.image import Picture

_LARGEST_SLOT = np.iinfo(np.int32).max


MOST_PINNED = 4
"""Versions that stay loaded beside the served ones, of all tasks together: each takes a slot, as a task does."""


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """What ``Session.sync`` changed; true where it changed anything.

    Attributes:
        added: Names of the tasks that are loaded now and were not before.
        updated: Names of those of which another version is loaded now.
        removed: Names of those that are no longer loaded.
        failed: What is wrong with the tasks that could not be brought to the bundle's version, by name.
    """

    added: tuple[str, ...] = ()
    updated: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.added or self.updated or self.removed)


@dataclass(frozen=True, kw_only=True)
class SessionDescription:
    """What a session runs, on what, and how much memory its prompt sets take.

    Attributes:
        runtime: The runtime, and why it was chosen.
        precision: Type of the graph's weights and matrix products.
        image_size: Side of the images that the graph takes, in pixels.
        slots: Slots of the table; 1 of a folded model.
        slots_used: Slots that are taken, also by versions that only requests under way still use.
        slot_bytes: What one more task takes, in bytes; 0 of a folded model.
        table_bytes: What all slots take, in bytes; 0 of a folded model.
    """

    runtime: RuntimeDescription
    precision: Precision
    image_size: int
    slots: int
    slots_used: int
    slot_bytes: int
    table_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the JSON form, those of the runtime first."""
        return {
            **self.runtime.to_json(),
            "precision": self.precision,
            "image_size": self.image_size,
            "slots": self.slots,
            "slots_used": self.slots_used,
            "slot_bytes": self.slot_bytes,
            "table_bytes": self.table_bytes,
        }


class Session:
    """Loaded tasks that share one graph on one device.

    ``vpdeploy.load`` opens one; close it, or use it as a context manager. Every method may be called from any thread.

    Args:
        artifact: What is served: its prompt sets are read into a table.
        backend: The artifact's graph, loaded; the session closes it.
        strict: Refuse a bundle of which a task is damaged. Otherwise those that are whole are loaded, and ``failures``
            tells of the others.

    Raises:
        BundleError: A prompt set is damaged, all are where ``strict`` is False, or the graph takes images of another
            form than is recorded.
        LayoutMismatchError: A prompt set does not fit the graph.
        BackendError: The device cannot hold the table.

    Example:
        >>> with vpdeploy.load(zoo) as session:
        ...     [answer] = session.predict(rose, task="flowers", top=3)
        >>> answer.task, len(answer.ranking)
        ('flowers', 3)
    """

    def __init__(self, artifact: Artifact, backend: Backend, *, strict: bool = True) -> None:
        if (backend.input_dtype == np.uint8) != (artifact.image_input == "uint8"):
            raise BundleCorruptError(
                f"{artifact.graph_path}: takes images of {backend.input_dtype}, recorded is '{artifact.image_input}'; "
                "export again"
            )
        self._artifact = artifact
        self._backend = backend
        self._bundle = artifact.bundle
        self._following = threading.Lock()  # one sync at a time: an older manifest must not have the last word
        self._changing = threading.Lock()  # one change of the table at a time; runs go on beside it
        self._table: Table | None = None
        self._directory = TaskDirectory(on_departure=self._refresh_holds)
        self._failures: dict[str, str] = {}
        self._reading: Mapping[str, int] = artifact.versions  # held from before they are read
        self._holds = None if self._bundle is None else Holds(self._bundle.path, self._held_names)
        try:
            self._load(strict=strict)
        except BaseException:
            self._let_go()
            raise

        # What sync has loaded. A version alone does not tell: a bundle that was copied over another may count anew.
        entries = {} if self._bundle is None else self._bundle.manifest.tasks
        self._unloaded: set[str] = set()
        self._pinned_files: dict[str, dict[str, str]] = {}
        self._synced = {name: entry for name, entry in entries.items() if name not in self._failures}

    @classmethod
    def of(cls, artifact: Artifact, *, runtime: str = AUTO, threads: int | None = None, strict: bool = True) -> Session:
        """Load an artifact's graph and its tasks.

        Args:
            artifact: A bundle or a folded model.
            runtime: ``auto``, or a runtime's name (see ``vpdeploy.backends.RUNTIMES``).
            threads: CPU threads inside one run; None leaves it to the runtime.
            strict: Refuse a bundle of which a task is damaged; otherwise load those that are whole.

        Returns:
            A session, owned by the caller.

        Raises:
            BundleError: A prompt set is damaged, or the graph takes images of another form than is recorded.
            LayoutMismatchError: A prompt set does not fit the graph.
            BackendError: The runtime asked for does not work here, or cannot load the graph.
            SpecError: There is no runtime of that name.
        """
        backend = open_backend(artifact, runtime=runtime, threads=threads)
        try:
            return cls(artifact, backend, strict=strict)
        except BaseException:
            backend.close()
            raise

    @property
    def preprocessing(self) -> Preprocessing:
        """How images are brought to the backbone's input; one for all tasks."""
        return self._artifact.preprocessing

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the loaded tasks."""
        return self._directory.tasks

    @property
    def failures(self) -> Mapping[str, str]:
        """What is wrong with the bundle's tasks that are not loaded, or in an older version only, by name."""
        return dict(self._failures)

    @property
    def artifact(self) -> Artifact:
        """What is served, as it was when the session was opened."""
        return self._artifact

    def lease(self, task: str) -> Lease:
        """Take the right to use a task's slot.

        Args:
            task: The task's name.

        Returns:
            A lease; use it as a context manager, or call its ``release``.

        Raises:
            TaskNotFoundError: No task of that name is loaded.
        """
        try:
            return self._directory.lease(task)
        except TaskNotFoundError:
            if task in self._failures:
                raise TaskNotFoundError(f"task '{task}' is damaged and not loaded; the log says what to do") from None
            raise

    def card(self, task: str) -> TaskCard:
        """Return what is known of a task.

        Args:
            task: The task's name.

        Raises:
            TaskNotFoundError: No task of that name is loaded.
        """
        with self.lease(task) as lease:
            return lease.card

    def predict(
        self, images: Picture | Sequence[Picture], task: str | None = None, *, top: int = 5
    ) -> list[Prediction]:
        """Classify images.

        Args:
            images: One picture or several: paths, encoded bytes, Pillow images, or uint8 arrays [H, W, 3] of any size.
            task: The task to ask; may be left out where only one is loaded.
            top: How many classes to name at most.

        Returns:
            One answer for each image, in order.

        Raises:
            TaskNotFoundError: No task of that name is loaded.
            SpecError: No task was named and several are loaded.
            InputError: A picture cannot be read; the message names it.
            MissingExtraError: Pillow is needed and not installed.
        """
        pictures: Sequence[Picture]
        if isinstance(images, (list, tuple)):
            pictures = images
        elif isinstance(images, np.ndarray) and images.ndim == 4:
            pictures = list(images)
        else:
            pictures = [images]  # type: ignore[list-item]
        answers = []
        with contextlib.closing(self.stream(pictures, task, top=top)) as stream:
            for _, answer in stream:
                if isinstance(answer, InputError):
                    raise answer
                answers.append(answer)
        return answers

    def stream(
        self, pictures: Iterable[Picture], task: str | None = None, *, top: int = 5
    ) -> Generator[tuple[Picture, Prediction | InputError], None, None]:
        """Classify any number of pictures, of which a few are in memory at a time; those that cannot be read, too.

        Pictures are decoded in threads, ahead of the batches that they run in.

        Args:
            pictures: As ``predict`` takes them; an iterator is read as answers are asked for.
            task: The task to ask; may be left out where only one is loaded. It is leased until the iterator ends.
            top: How many classes to name at most.

        Returns:
            An iterator of each picture in order, with its answer, or with the error that says what is wrong with it.

        Raises:
            TaskNotFoundError: No task of that name is loaded; raised with the first answer.
            SpecError: No task was named and several are loaded; raised with the first answer.
            MissingExtraError: Pillow is needed and not installed.

        Example:
            >>> with vpdeploy.load(zoo) as session:
            ...     for picture, answer in session.stream([rose, "none.jpg"], task="flowers"):
            ...         print(answer if isinstance(answer, vpdeploy.InputError) else answer.task)
            flowers
            none.jpg: file not found
        """
        with self.lease(self._sole_task(task)) as lease:
            yield from answer_each(pictures, self._to_pixels, lease, self.run, top=top)

    def run(self, images: npt.NDArray[np.uint8], slots: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Run one batch whose rows may belong to different tasks. Hold a lease on every slot meanwhile.

        Args:
            images: uint8 [B, H, W, 3], RGB, H = W = ``preprocessing.image_size``.
            slots: int32 [B], from ``Lease.slot``.

        Returns:
            Logits, float32 [B, C]; C is the largest class count of the table, and classes beyond a task's own are
            about -30000.

        Raises:
            InputError: Shapes or dtypes do not fit, or a slot is out of range.
            BackendError: The runtime failed.
        """
        table, size = self._table, self.preprocessing.image_size
        if images.dtype == np.uint8 and images.shape == (0, size, size, 3) and slots.shape == (0,):
            classes = table.sizes["classes"] if table is not None else len(self.card(self.tasks[0]).labels)
            return np.zeros((0, classes), dtype=np.float32)

        # The backend checks what it is given. What it never sees as it came, or has no rows to count, is checked here.
        pixels: npt.NDArray[np.generic] = images
        if self._artifact.image_input != "uint8" or images.ndim != 4:
            check_images(images, shape=(size, size, 3), dtype=np.dtype(np.uint8))
            pixels = normalise(images, self.preprocessing)
        if slots.dtype != np.int32 and slots.dtype.kind in "iu":
            # Clipped: a wide integer must not wrap into the table.
            slots = np.clip(slots.astype(np.int64), -1, _LARGEST_SLOT).astype(np.int32)
        if table is None:
            check_slots(slots, count=len(images), slot_count=1)

        return self._backend.run(np.ascontiguousarray(pixels), None if table is None else np.ascontiguousarray(slots))

    def add_task(self, prompt_set: CompiledPromptSet, *, version: int | None = None) -> None:
        """Load a task, or replace one of that name, while others are being served.

        Nothing is rebuilt: a slot is written. Requests under way keep the version they started with.

        Args:
            prompt_set: The task's compiled prompt set; its card names the task.
            version: The version under which a bundle published it; None where there is none.

        Raises:
            SpecError: This is a folded model, which holds one task.
            LayoutMismatchError: The prompt set does not fit the graph.
            BackendError: The device cannot hold it; what is loaded is undisturbed.
        """
        size_bytes = prompt_set.size_bytes
        self._place(
            prompt_set, lambda slot: self._directory.admit(prompt_set.card, slot, version, size_bytes=size_bytes)
        )

    def load_version(self, task: str, version: int) -> None:
        """Load a version that the bundle keeps, beside the one that is served: it is asked for as ``flowers@2``.

        A few such versions stay loaded, of all tasks together; those that were not used the longest leave.

        Args:
            task: The task's name.
            version: The version.

        Raises:
            TaskNotFoundError: No task of that name is loaded, or the bundle keeps no such version.
            BundleError: The bundle or this version is damaged.
            BackendError: The device cannot hold it; what is loaded is undisturbed.
        """
        reference = f"{task}@{version}"
        with self._following:
            self._directory.lease(task).release()  # a task that is not served has no versions either
            try:
                self._directory.lease(reference).release()
                return
            except TaskNotFoundError:
                if self._bundle is None:
                    raise
            bundle = Bundle.open(self._bundle.path)
            prompt_set = bundle.read_task(task, version)
            self._pinned_files[reference] = bundle.manifest.tasks[task].files[version]
            pin = partial(self._directory.pin, prompt_set.card, most=MOST_PINNED, size_bytes=prompt_set.size_bytes)
            self._place(prompt_set, lambda slot: pin(slot, version))

    def _place(self, prompt_set: CompiledPromptSet, admit: Callable[[int], None]) -> None:
        """Bring a prompt set to the device while others are being served, and admit it to the slot it is in.

        Raises:
            As ``add_task``.
        """
        self._artifact.check_fit(prompt_set)
        sizes = prompt_set.sizes()
        with self._changing:
            # Find a table with room: the bound one, or a larger copy that nothing runs on yet.
            old = self._table
            full = self._directory.is_full  # asked once: a lease that ends meanwhile would change the answer
            table = self._table_for(prompt_set, sizes, full=full)

            # Take a slot that no request refers to. A full directory means that the table grows: its first new slot.
            reserved = None if full else self._directory.reserve()
            slot = reserved if reserved is not None else (old.slots if old else 0)

            # Write the slot and bring it to the device; if that fails, what is loaded is as it was.
            try:
                table.write(slot, prompt_set)
                if table is old:
                    self._backend.refresh_slot(slot)
                else:
                    self._bind(table)
            except BaseException:
                if reserved is not None:
                    self._directory.give_back(reserved)
                raise

            # Serve the task from now on; the slot of an older version is freed when its last lease ends.
            if reserved is None:
                self._directory.extend(range(slot + 1, table.slots))
            admit(slot)

    def reserve_table(self) -> None:
        """Give a bundle that holds no task yet a table of one free slot, so that a batch can run.

        Raises:
            BackendError: The device cannot hold it.
        """
        layout = self._artifact.layout
        with self._changing:
            if layout is not None and self._table is None:
                self._bind(Table(layout, dict.fromkeys(layout.axes, 1), 1))
                self._directory.extend(range(1))

    def remove_task(self, task: str) -> None:
        """Serve a task no longer; requests under way are answered.

        Args:
            task: The task's name.

        Raises:
            TaskNotFoundError: No task of that name is loaded.
        """
        self._directory.dismiss(task)

    def sync(self) -> SyncReport:
        """Bring the loaded tasks in line with the bundle's manifest on disk.

        A task that is damaged, or finds no room on the device, keeps no other from being followed; what is loaded of
        it stays, and the next call tries again.

        Returns:
            The tasks that were added, updated and removed, and those that failed; none of a folded model, which never
            changes.

        Raises:
            BundleError: The manifest is damaged, or the graph was replaced; what is loaded is undisturbed.
        """
        if self._bundle is None:
            return SyncReport()
        path = self._bundle.path
        with self._following:
            return read_consistently(path, lambda: self._follow(Bundle.open(path)))

    def _load(self, *, strict: bool) -> None:
        """Load the artifact's tasks."""
        self._refresh_holds()
        artifact = self._artifact
        prompt_sets, self._failures = _read_tasks(artifact, strict=strict)

        # The first tasks take the slots in their order, as in the table; a folded model has one slot and no table.
        cards = [each.card for each in prompt_sets] if artifact.is_switchable else list(artifact.cards.values())
        self._directory.extend(range(len(cards)))
        if prompt_sets:
            self._bind(Table.of(prompt_sets))
        size_bytes = {each.card.name: each.size_bytes for each in prompt_sets}
        for card in cards:
            slot, version = self._directory.reserve(), artifact.versions.get(card.name)
            self._directory.admit(card, slot, version, size_bytes=size_bytes.get(card.name))
        self._reading = {}
        self._refresh_holds()

    @property
    def unloaded(self) -> tuple[str, ...]:
        """Names of the tasks that ``unload_task`` took away."""
        return tuple(sorted(self._unloaded))

    def unload_task(self, task: str) -> None:
        """Serve a task of the bundle no longer, whatever is published, until ``load_task``; the bundle keeps it.

        Args:
            task: The task's name.

        Raises:
            TaskNotFoundError: No task of that name is loaded.
        """
        self.remove_task(task)
        self._unloaded.add(task)

    def load_task(self, task: str) -> None:
        """Serve a task as the bundle on disk has it now.

        Args:
            task: The task's name.

        Raises:
            TaskNotFoundError: The bundle has no task of that name.
            BundleError: The bundle or this task of it is damaged.
        """
        self._unloaded.discard(task)
        self.sync()
        with self.lease(task):
            pass

    def _follow(self, fresh: Bundle) -> SyncReport:
        """Bring the loaded tasks in line with the bundle as it is now."""
        if self._bundle is not None and fresh.manifest.graph_sha256 != self._bundle.manifest.graph_sha256:
            raise BundleError(f"{fresh.path}: the graph was replaced; restart to serve it")
        loaded = self._directory.versions()
        entries = {name: entry for name, entry in fresh.manifest.tasks.items() if name not in self._unloaded}
        changed = [
            name
            for name, entry in entries.items()
            if loaded.get(name) != entry.version or self._synced.get(name, entry).served != entry.served
        ]
        self._unpin_what_changed(entries)
        self._reading = {name: entries[name].version for name in changed}
        self._refresh_holds()
        prompt_sets, damaged = fresh.read_whole(changed)
        failed = {name: str(error) for name, error in damaged.items()}
        removed = tuple(name for name in loaded if name not in entries)
        for name in removed:
            self.remove_task(name)
        for name, prompt_set in prompt_sets.items():
            try:
                self.add_task(prompt_set, version=entries[name].version)
            except VpdeployError as error:
                failed[name] = str(error)
            else:
                self._synced[name] = entries[name]
        self._failures = failed
        self._reading = {}
        self._refresh_holds()
        brought = [name for name in changed if name not in failed]
        return SyncReport(
            added=tuple(name for name in brought if name not in loaded),
            updated=tuple(name for name in brought if name in loaded),
            removed=removed,
            failed=failed,
        )

    def _unpin_what_changed(self, entries: Mapping[str, TaskEntry]) -> None:
        """Let go of versions that the bundle keeps no more, or under whose number it has another one."""
        for reference in self._directory.pinned:
            task, version = split_reference(reference)
            kept = entries[task].files.get(version or 0) if task in entries else None
            if kept != self._pinned_files.get(reference):
                self._directory.unpin(reference)
        self._pinned_files = {each: self._pinned_files[each] for each in self._directory.pinned}

    def describe(self) -> SessionDescription:
        """Return the runtime and why it was chosen, the precision, and the table's size in slots and bytes."""
        table = self._table
        return SessionDescription(
            runtime=self._backend.describe(),
            precision=self._artifact.precision,
            image_size=self.preprocessing.image_size,
            slots=table.slots if table else 1,
            slots_used=self._directory.used,
            slot_bytes=table.slot_bytes if table else 0,
            table_bytes=table.size_bytes if table else 0,
        )

    def close(self) -> None:
        """Release the graph and the table."""
        self._backend.close()
        self._let_go()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _refresh_holds(self) -> None:
        """Hold on the disk what is loaded or about to be, so that no writer removes it, and nothing else."""
        if self._holds is not None:
            self._holds.refresh()

    def _let_go(self) -> None:
        if self._holds is not None:
            self._holds.close()

    def _held_names(self) -> set[str]:
        data = self._artifact.data
        files = {self._artifact.graph_path.name} | (set() if data is None else {data.name})
        versions = self._directory.residents() | set(self._reading.items())
        loaded = {version_name(task, version) for task, version in versions if version is not None}
        return {graph_name(file) for file in files} | loaded

    def _to_pixels(self, picture: Picture) -> npt.NDArray[np.uint8]:
        return to_pixels(picture, self.preprocessing)

    def _bind(self, table: Table) -> None:
        self._backend.bind_table(table)
        self._table = table

    def _table_for(self, prompt_set: CompiledPromptSet, sizes: dict[str, int], *, full: bool) -> Table:
        """Return the table, or a larger copy when no slot is free or the prompt set is longer than the slots."""
        old = self._table
        if old is None:
            return Table.of([prompt_set])
        if not full and old.accepts(sizes):
            return old
        # A thirty-second at a time: adding many tasks stays cheap, and little memory lies idle.
        slots = old.slots + max(1, old.slots // 32) if full else old.slots
        return old.resized(common_sizes([old.sizes, sizes]), slots)

    def _sole_task(self, task: str | None) -> str:
        if task is not None:
            return task
        tasks = self.tasks
        if len(tasks) != 1:
            state = f"several tasks are loaded, name one of: {', '.join(tasks)}" if tasks else "no task is loaded"
            raise SpecError(state)
        return tasks[0]


def _read_tasks(artifact: Artifact, *, strict: bool) -> tuple[tuple[CompiledPromptSet, ...], dict[str, str]]:
    """Return the prompt sets that are loaded, and what is wrong with the others, by name.

    Raises:
        BundleError: One cannot be read, or where ``strict`` is False not a single one.
        LayoutMismatchError: One does not fit the graph.
    """
    if strict or artifact.bundle is None:
        return artifact.read_prompt_sets(), {}
    whole, damaged = artifact.bundle.read_whole(artifact.tasks)
    if damaged and not whole:
        raise next(iter(damaged.values()))
    return tuple(whole.values()), {name: str(error) for name, error in damaged.items()}


def load(path: Path | str, *, runtime: str = AUTO, threads: int | None = None, strict: bool = True) -> Session:
    """Load a bundle or a folded ONNX file.

    Args:
        path: A bundle folder, or a file that ``vpdeploy export`` wrote.
        runtime: ``auto``, or a runtime's name (see ``vpdeploy.backends.RUNTIMES``).
        threads: CPU threads inside one run; None leaves it to the runtime.
        strict: Refuse a bundle of which a task is damaged. Otherwise those that are whole are loaded, and
            ``Session.failures`` tells of the others.

    Returns:
        A session, owned by the caller.

    Raises:
        BundleError: The path is neither, or a file of it is damaged, foreign or of another version.
        LayoutMismatchError: A prompt set does not fit the bundle's graph.
        BackendError: The runtime asked for does not work here, or cannot load the graph.
        SpecError: There is no runtime of that name.

    Example:
        >>> with vpdeploy.load(zoo) as session:
        ...     session.tasks
        ('flowers', 'birds', 'probe')
    """
    place = Path(path)
    return read_consistently(
        place, lambda: Session.of(Artifact.open(place), runtime=runtime, threads=threads, strict=strict)
    )
