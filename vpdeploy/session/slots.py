"""Which task lives in which slot, and who is still using it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

from vpdeploy.errors import TableFullError, TaskNotFoundError
from vpdeploy.format.task import TaskCard, split_reference
from vpdeploy.text import cut_name


@dataclass(kw_only=True, eq=False)
class _Resident:
    """A prompt set in a slot. A retired one serves no new requests and leaves when its last lease ends."""

    card: TaskCard
    slot: int
    version: int | None
    size_bytes: int | None
    generation: int
    leases: int = 0
    retired: bool = field(default=False)


class Lease:
    """The right to use a task's slot: it is not given to another task before ``release``.

    Attributes:
        slot: Index into the table.
        card: The task as it was when the lease was taken.
        version: The published version in the bundle; None where there is none.
        size_bytes: Size of its compiled prompt set; None of a folded model, whose prompts are constants.
        generation: How many prompt sets had been loaded when this one was, itself included. Name and generation
            identify it: a name, or a version of a bundle that was copied over another, may come to mean another one.
    """

    def __init__(self, directory: TaskDirectory, resident: _Resident) -> None:
        self._directory: TaskDirectory | None = directory
        self._resident = resident
        self.slot = resident.slot
        self.card = resident.card
        self.version = resident.version
        self.size_bytes = resident.size_bytes
        self.generation = resident.generation

    def release(self) -> None:
        """End the lease; a second call does nothing."""
        directory, self._directory = self._directory, None
        if directory is not None:
            directory._end_lease(self._resident)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class TaskDirectory:
    """Names, slots and leases of the loaded tasks. Every method may be called from any thread.

    Args:
        slots: How many slots the table has at first; all of them are free.
        on_departure: Called when a prompt set is retired, and when the last lease on it has ended.
    """

    def __init__(self, slots: int = 0, *, on_departure: Callable[[], None] | None = None) -> None:
        self._lock = threading.Lock()
        self._residents: dict[str, _Resident] = {}
        self._slots = slots
        self._free = set(range(slots))
        self._admitted = 0
        self._leaving: set[_Resident] = set()
        self._pinned: OrderedDict[str, _Resident] = OrderedDict()  # the one used last stands last
        self._on_departure = on_departure or (lambda: None)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that can be asked for, in the order in which they were added."""
        with self._lock:
            return tuple(self._residents)

    @property
    def used(self) -> int:
        """Slots that are taken: by tasks, by versions that requests under way still use, and reserved ones."""
        with self._lock:
            return self._slots - len(self._free)

    @property
    def is_full(self) -> bool:
        """Whether every slot is taken."""
        with self._lock:
            return not self._free

    def versions(self) -> dict[str, int | None]:
        """Return the served version of each task."""
        with self._lock:
            return {name: resident.version for name, resident in self._residents.items()}

    def residents(self) -> set[tuple[str, int | None]]:
        """Return name and version of every prompt set in a slot, also of those that only requests under way use."""
        with self._lock:
            return {
                (each.card.name, each.version)
                for each in (*self._residents.values(), *self._pinned.values(), *self._leaving)
            }

    def lease(self, task: str) -> Lease:
        """Take the right to use the slot of a task, or of a version of it (``flowers@2``).

        Raises:
            TaskNotFoundError: No task of that name is loaded, or not in that version.
        """
        with self._lock:
            resident = self._find(task)
            if resident is None:
                known = ", ".join(list(self._residents)[:20]) or "none"
                raise TaskNotFoundError(f"no task '{cut_name(task)}'; loaded: {known}")
            resident.leases += 1
            return Lease(self, resident)

    def _find(self, reference: str) -> _Resident | None:
        name, version = split_reference(reference)
        served = self._residents.get(name)
        if version is None or served is None or version == (served.version or 1):
            return served
        if reference in self._pinned:
            self._pinned.move_to_end(reference)
        return self._pinned.get(reference)

    @property
    def pinned(self) -> tuple[str, ...]:
        """The versions that are loaded beside the served ones, as ``flowers@2``."""
        with self._lock:
            return tuple(self._pinned)

    def pin(self, card: TaskCard, slot: int, version: int, *, size_bytes: int | None, most: int) -> None:
        """Keep a version in a reserved slot beside the one that is served.

        Args:
            card: The task as it is in this version.
            slot: The slot.
            version: The version.
            size_bytes: Size of its prompt set.
            most: How many such versions stay, of all tasks; those that were not used the longest leave.
        """
        with self._lock:
            self._admitted += 1
            resident = _Resident(
                card=card, slot=slot, version=version, size_bytes=size_bytes, generation=self._admitted
            )
            if card.name not in self._residents:  # it has been removed meanwhile
                self._retire(resident)
            else:
                self._unpin(reference := f"{card.name}@{version}")
                self._pinned[reference] = resident
                for oldest in list(self._pinned)[:-most]:
                    self._unpin(oldest)
        self._on_departure()

    def unpin(self, reference: str) -> None:
        """Keep a version no longer."""
        with self._lock:
            self._unpin(reference)
        self._on_departure()

    def _unpin(self, reference: str) -> None:
        if (resident := self._pinned.pop(reference, None)) is not None:
            self._retire(resident)

    def reserve(self) -> int:
        """Take a free slot; ``admit`` or ``give_back`` must follow.

        Raises:
            TableFullError: Every slot is taken.
        """
        with self._lock:
            if not self._free:
                raise TableFullError("every slot of the table is taken")
            slot = min(self._free)
            self._free.remove(slot)
            return slot

    def give_back(self, slot: int) -> None:
        """Return a reserved slot that was not used after all."""
        with self._lock:
            self._free.add(slot)

    def extend(self, slots: range) -> None:
        """Add the slots by which the table has grown."""
        with self._lock:
            self._free.update(slots)
            self._slots = slots.stop

    def admit(self, card: TaskCard, slot: int, version: int | None, *, size_bytes: int | None = None) -> None:
        """Serve a task from a reserved slot, instead of an older version of it if there is one."""
        with self._lock:
            old = self._residents.get(card.name)
            self._admitted += 1
            self._residents[card.name] = _Resident(
                card=card, slot=slot, version=version, size_bytes=size_bytes, generation=self._admitted
            )
            self._unpin(f"{card.name}@{version}")
            if old is not None:
                self._retire(old)
        if old is not None:
            self._on_departure()

    def dismiss(self, task: str) -> None:
        """Serve a task no longer; its slot is freed when the last lease on it ends.

        Raises:
            TaskNotFoundError: No task of that name is loaded.
        """
        with self._lock:
            if task not in self._residents:
                raise TaskNotFoundError(f"no task '{task}'; nothing to remove")
            self._retire(self._residents.pop(task))
            for reference in [each for each in self._pinned if split_reference(each)[0] == task]:
                self._unpin(reference)
        self._on_departure()

    def _retire(self, resident: _Resident) -> None:
        resident.retired = True
        if resident.leases == 0:
            self._free.add(resident.slot)
        else:
            self._leaving.add(resident)

    def _end_lease(self, resident: _Resident) -> None:
        with self._lock:
            resident.leases -= 1
            left = resident.retired and resident.leases == 0
            if left:
                self._free.add(resident.slot)
                self._leaving.discard(resident)
        if left:
            self._on_departure()
