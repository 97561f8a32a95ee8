"""A bundle on disk: one shared graph and the compiled prompt sets of many tasks.

::

    zoo/  manifest.json                  the commit point: a change is real once this file is replaced
          model.onnx                     the switchable graph
          model.DIGEST.data              its weights, where one file cannot hold them
          tasks/NAME/VERSION/            task.json + prompts.safetensors, never changed once published
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from vpdeploy.errors import (
    BundleCorruptError,
    BundleError,
    LayoutMismatchError,
    SpecError,
    StorageFullError,
    TaskNotFoundError,
    VersionConflictError,
    VpdeployError,
)
from vpdeploy.files import (
    creating_folder,
    describe_error,
    locked,
    replacing_file,
    sha256_of_file,
    storage_reason,
    write_atomically,
)
from vpdeploy.format.datafile import DataFile, move_data
from vpdeploy.format.document import Document, to_json
from vpdeploy.format.holds import make_holds_file
from vpdeploy.format.leftovers import Leftover, find_leftovers, remove_leftovers
from vpdeploy.format.manifest import (
    GRAPH_FILE,
    MANIFEST_FILE,
    TASKS_FOLDER,
    VERSION_NAME,
    BundleFacts,
    Manifest,
    TaskEntry,
)
from vpdeploy.format.promptset import CARD_FILE, TENSOR_FILE, CompiledPromptSet
from vpdeploy.format.task import check_task_name

_T = TypeVar("_T")

LOCK_FILE = ".lock"


class Bundle:
    """A bundle folder as its manifest describes it at one moment.

    Args:
        path: The folder.
        manifest: The folder's manifest, already read.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path) -> Bundle:
        """Read a bundle's manifest; the graph and the prompt sets are checked when they are read.

        Raises:
            BundleError: The folder is no bundle.
            BundleCorruptError: The manifest is damaged.
            BundleVersionError: It was written in a format version that is not read here.
        """
        manifest_path = path / MANIFEST_FILE
        if path.is_file():
            raise BundleError(f"{path}: is a file, expected a bundle's folder, as vpdeploy export writes it")
        if not is_bundle(path):
            raise BundleError(f"{path}: not a bundle, {MANIFEST_FILE} is missing; write one with vpdeploy export")
        return cls(path, Manifest.from_document(Document.read(manifest_path)))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order in which they were added."""
        return tuple(self.manifest.tasks)

    @property
    def versions(self) -> dict[str, int]:
        """The served version of each task."""
        return {name: entry.version for name, entry in self.manifest.tasks.items()}

    def verified_graph(self) -> Path:
        """Return the path of the graph after comparing its bytes, and those of its data file, with the manifest.

        Raises:
            BundleCorruptError: A file is missing or was changed.
        """
        path = self.path / self.manifest.graph_file
        try:
            found = sha256_of_file(path)
        except FileNotFoundError:
            raise BundleCorruptError(f"{path}: file is missing; restore it or export again") from None
        except OSError as error:
            raise BundleCorruptError(f"{path}: cannot be read: {error.strerror}; export again") from error
        if found != self.manifest.graph_sha256:
            raise BundleCorruptError(f"{path}: contents do not match the manifest's sha256; export again")
        if self.manifest.graph_data is not None:
            self.manifest.graph_data.verify(self.path)
        return path

    def read_task(self, task: str, version: int | None = None) -> CompiledPromptSet:
        """Read one task and check it against the manifest.

        Args:
            task: The task's name.
            version: The version; None for the one that is served.

        Raises:
            TaskNotFoundError: The bundle holds no such task or version.
            BundleCorruptError: A file is missing, truncated or was changed.
            BundleVersionError: It was written in a format version that is not read here.
            LayoutMismatchError: The prompt set's layout is not the bundle's.
        """
        entry = self.manifest.entry(task)
        version = entry.version if version is None else version
        if version not in entry.files:
            raise TaskNotFoundError(f"task '{task}' has no version {version}; kept: {', '.join(map(str, entry.files))}")
        folder = self._version_folder(task, version)
        files = {name: self._verified_bytes(folder / name, entry.files[version]) for name in (CARD_FILE, TENSOR_FILE)}
        prompt_set = CompiledPromptSet.decode(files, folder=folder)
        if prompt_set.card.name != task:
            raise BundleCorruptError(f"{folder / CARD_FILE}: describes task '{prompt_set.card.name}', not '{task}'")
        self.manifest.check_fit(prompt_set)
        return prompt_set

    def read_whole(self, tasks: Iterable[str]) -> tuple[dict[str, CompiledPromptSet], dict[str, VpdeployError]]:
        """Read the served versions of those tasks that are whole.

        Args:
            tasks: Names of tasks of the manifest.

        Returns:
            The prompt sets of those that can be read, and what is wrong with each of the others, by name.

        Raises:
            BundleError: A task cannot be read, and the manifest on disk is no longer this one: ``read_consistently``
                begins again.
        """
        whole: dict[str, CompiledPromptSet] = {}
        damaged: dict[str, VpdeployError] = {}
        for task in tasks:
            try:
                whole[task] = self.read_task(task)
            except (BundleError, LayoutMismatchError) as error:
                if not self._is_current():
                    raise
                damaged[task] = error
        return whole, damaged

    def _is_current(self) -> bool:
        """Tell whether the manifest on disk is still this one."""
        try:
            return Bundle.open(self.path).manifest == self.manifest
        except BundleError:
            return False

    def _version_folder(self, task: str, version: int) -> Path:
        return self.path / TASKS_FOLDER / task / str(version)

    def _verified_bytes(self, path: Path, digests: Mapping[str, str]) -> bytes:
        """Read a file whose sha256 the manifest knows."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BundleCorruptError(f"{path}: cannot be read: {error.strerror}; export again") from error
        if hashlib.sha256(data).hexdigest() != digests.get(path.name):
            raise BundleCorruptError(f"{path}: contents do not match the manifest's sha256; export again")
        return data


def read_consistently(path: Path, read: Callable[[], _T]) -> _T:
    """Return what ``read`` makes of a bundle, begun again where the bundle was replaced meanwhile.

    A replacement removes the files that it drops, so who has read the manifest before may miss them.

    Args:
        path: The bundle.
        read: Reads it, from the manifest on.

    Raises:
        VpdeployError: What ``read`` raises, of a bundle that nobody has changed meanwhile.
    """
    while True:
        before = _manifest_bytes(path)
        try:
            return read()
        except VpdeployError:
            if _manifest_bytes(path) == before:
                raise


def _manifest_bytes(path: Path) -> bytes | None:
    try:
        return (path / MANIFEST_FILE).read_bytes()
    except OSError:
        return None


def is_bundle(path: Path) -> bool:
    """Tell whether a path looks like a bundle, without reading it.

    Raises:
        BundleError: The folder may not be looked into.
    """
    try:
        return (path / MANIFEST_FILE).is_file()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from error


def write_bundle(
    path: Path,
    facts: BundleFacts,
    prompt_sets: list[CompiledPromptSet],
    graph: Path,
    *,
    data: DataFile | None = None,
) -> Bundle:
    """Write a new bundle folder; a crash leaves none.

    Args:
        path: The folder; it is empty, or not there.
        facts: What the tasks share; the manifest is made of them and of the files.
        prompt_sets: The tasks' compiled prompt sets.
        graph: The ONNX file; it is moved into the folder.
        data: The file beside the graph that holds its weights; it is moved too. None where the graph holds them.

    Raises:
        BundleError: ``path`` holds something, or cannot be written.
        LayoutMismatchError: A prompt set does not fit.
    """
    check_replaceable(path)
    if is_bundle(path):
        raise BundleError(f"{path}: another export has written a bundle there; it is as that one left it")
    for prompt_set in prompt_sets:
        facts.check_fit(prompt_set)
    manifest = Manifest.of(facts, graph_sha256=sha256_of_file(graph), graph_data=data)
    with _storage_errors(path), creating_folder(path) as folder:
        if data is not None:
            shutil.move(graph.parent / data.name, folder / data.name)
        shutil.move(graph, folder / GRAPH_FILE)
        for prompt_set in prompt_sets:
            manifest = _with_version(folder, manifest, prompt_set)
        make_holds_file(folder)
        _replace_manifest(folder, manifest)
    return Bundle.open(path)


def replace_bundle(
    path: Path,
    facts: BundleFacts,
    prompt_sets: list[CompiledPromptSet],
    graph: Path,
    *,
    data: DataFile | None = None,
) -> Bundle:
    """Bring a bundle to new contents, or write it where there is none; a crash leaves the old state or the new one.

    Args:
        path: The folder.
        facts: What the tasks share; the manifest is made of them and of the files.
        prompt_sets: The tasks' compiled prompt sets; a task that was there gets a new version, the others are dropped.
        graph: The ONNX file; it is moved into the folder.
        data: The file beside the graph that holds its weights; it is moved too. None where the graph holds them.

    Raises:
        BundleError: ``path`` exists and is something else, or cannot be written.
        LayoutMismatchError: A prompt set does not fit.
    """
    if not is_bundle(path):
        return write_bundle(path, facts, prompt_sets, graph, data=data)
    for prompt_set in prompt_sets:
        facts.check_fit(prompt_set)
    manifest = Manifest.of(facts, graph_sha256=sha256_of_file(graph), graph_data=data)
    with _changing(path) as old:
        _replace_contents(old, manifest, prompt_sets, graph)
    return Bundle.open(path)


def check_replaceable(path: Path) -> None:
    """Check that a bundle may be written at ``path``.

    Raises:
        BundleError: There is a file, or a non-empty folder that is no bundle.
    """
    if path.exists() and not is_bundle(path) and (not path.is_dir() or any(path.iterdir())):
        raise BundleError(f"{path}: exists and is not a bundle; give another --out or remove it")


def publish_task(path: Path, prompt_set: CompiledPromptSet) -> int:
    """Add a task to a bundle, or publish a new version of it.

    The new version's folder is complete on disk before the manifest names it, so a crash leaves the old state.

    Returns:
        The version that is now served.

    Raises:
        LayoutMismatchError: The prompt set does not fit the bundle.
        BundleError: The bundle cannot be read or written.
    """
    return publish_tasks(path, [prompt_set])[prompt_set.card.name]


Condition = Callable[[int | None], bool]
"""Tells of the served version of a task (None where there is no such task) whether a change is still meant."""


def publish_tasks(
    path: Path,
    prompt_sets: Sequence[CompiledPromptSet],
    *,
    graph_sha256: str | None = None,
    condition: Condition | None = None,
) -> dict[str, int]:
    """Add tasks to a bundle, or publish new versions of them, all at one moment; everything else stays.

    Args:
        path: The bundle.
        prompt_sets: The tasks' compiled prompt sets, each of another name.
        graph_sha256: The graph that they were compared in; None takes whichever the bundle has.
        condition: What the tasks' versions must be; None takes whichever they are.

    Returns:
        The version of each task that is now served.

    Raises:
        LayoutMismatchError: A prompt set does not fit the bundle.
        VersionConflictError: A task is at another version than the condition says.
        BundleError: The bundle cannot be read or written, or its graph was replaced.
    """
    names = [check_task_name(prompt_set.card.name) for prompt_set in prompt_sets]
    with _changing(path) as bundle:
        manifest = bundle.manifest
        if graph_sha256 not in (None, manifest.graph_sha256):
            raise BundleError(f"{path}: its graph was replaced meanwhile, nothing was added; run the command again")
        for name in names:
            check_version(manifest, name, condition)
        for prompt_set in prompt_sets:
            manifest.check_fit(prompt_set)
        for prompt_set in prompt_sets:
            manifest = _with_version(path, manifest, prompt_set)
        _replace_manifest(path, manifest)
        return {name: manifest.tasks[name].version for name in names}


def check_version(manifest: Manifest, task: str, condition: Condition | None) -> None:
    """Check that a task is at a version that a change is meant for.

    Raises:
        VersionConflictError: It is at another.
    """
    served = manifest.tasks[task].version if task in manifest.tasks else None
    if condition is not None and not condition(served):
        state = "is not in the bundle" if served is None else f"is at version {served}"
        raise VersionConflictError(f"task '{task}' {state}, nothing was changed; look at it again before you change it")


def withdraw_task(path: Path, task: str, *, condition: Condition | None = None) -> list[int]:
    """Remove a task and all its versions from a bundle.

    Args:
        path: The bundle.
        task: The task's name.
        condition: What the task's version must be; None takes whichever it is.

    Returns:
        The versions that are gone.

    Raises:
        TaskNotFoundError: The bundle holds no such task.
        VersionConflictError: The task is at another version than the condition says.
        BundleError: The bundle cannot be read or written.
    """
    with _changing(path) as bundle:
        entry = bundle.manifest.entry(task)
        check_version(bundle.manifest, task, condition)
        _replace_manifest(path, bundle.manifest.without_task(task))
        return sorted(entry.files)


def roll_back_task(path: Path, task: str, *, condition: Condition | None = None) -> int:
    """Serve a task's previous version again.

    Args:
        path: The bundle.
        task: The task's name.
        condition: What the task's version must be; None takes whichever it is.

    Returns:
        The version that is now served.

    Raises:
        TaskNotFoundError: The bundle holds no such task.
        VersionConflictError: The task is at another version than the condition says.
        SpecError: There is no earlier version.
        BundleError: The earlier version is damaged; nothing is changed.
    """
    with _changing(path) as bundle:
        entry = bundle.manifest.entry(task)
        check_version(bundle.manifest, task, condition)
        if (previous := entry.previous_version) is None:
            raise SpecError(f"task '{task}' has no version before {entry.version}; nothing to roll back to")
        manifest = bundle.manifest.with_task(task, replace(entry, version=previous))
        Bundle(path, manifest).read_task(task)
        _replace_manifest(path, manifest)
        return previous


def collect_leftovers(path: Path, *, dry_run: bool = False) -> list[Leftover]:
    """Remove what lies in a bundle's folder, or half written beside it, and belongs to it no more.

    Every change of the bundle does so too. What a running process holds stays: it goes with a later call.

    Args:
        path: The bundle.
        dry_run: Remove nothing.

    Returns:
        What was removed, or would be, and what stays because it is held.

    Raises:
        BundleError: The bundle cannot be read or written.
    """
    with _locked(path) as bundle:
        return (find_leftovers if dry_run else remove_leftovers)(path, bundle.manifest)


def _replace_contents(old: Bundle, manifest: Manifest, prompt_sets: list[CompiledPromptSet], graph: Path) -> None:
    """Bring a live bundle to new contents: new files first, then the manifest."""
    manifest = replace(manifest, withdrawn=old.manifest.without_tasks().withdrawn)
    if manifest.graph_sha256 == old.manifest.graph_sha256:
        manifest = replace(manifest, graph_file=old.manifest.graph_file)
    elif (old.path / GRAPH_FILE).exists():
        manifest = replace(manifest, graph_file=f"{Path(GRAPH_FILE).stem}.{manifest.graph_sha256[:12]}.onnx")
    if manifest.graph_data is not None:
        move_data(manifest.graph_data, graph.parent, old.path)
    with replacing_file(old.path / manifest.graph_file) as temporary:
        shutil.move(graph, temporary)
    for prompt_set in prompt_sets:
        manifest = _with_version(old.path, manifest, prompt_set)
    _replace_manifest(old.path, manifest)


def _with_version(path: Path, manifest: Manifest, prompt_set: CompiledPromptSet) -> Manifest:
    """Write a new version's folder and return the manifest that serves it."""
    name = check_task_name(prompt_set.card.name)
    known = manifest.tasks.get(name)
    version = _next_free_version(path, name, manifest.last_version(name))
    encoded = prompt_set.encode()
    with creating_folder(path / TASKS_FOLDER / name / str(version)) as folder:
        for file_name, data in encoded.items():
            (folder / file_name).write_bytes(data)
    digests = {file_name: hashlib.sha256(data).hexdigest() for file_name, data in encoded.items()}
    files = {**(known.files if known else {}), version: digests}
    return manifest.with_task(name, TaskEntry(version=version, files=files))


def _next_free_version(path: Path, task: str, last: int) -> int:
    """Return the number after a task's last version, or after that of a folder that a crash left."""
    folders = (path / TASKS_FOLDER / task).glob("*")
    return 1 + max([last, *(int(folder.name) for folder in folders if VERSION_NAME.fullmatch(folder.name))])


def _replace_manifest(path: Path, manifest: Manifest) -> None:
    write_atomically(path / MANIFEST_FILE, to_json(manifest.to_fields()).encode())


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[Bundle]:
    """Open a bundle for one writer at a time; what it names no more, before the block or after, is removed."""
    with _locked(path) as bundle:
        make_holds_file(path)
        remove_leftovers(path, bundle.manifest)
        try:
            yield bundle
        finally:
            # What a reader may be reading is named by the manifest, before as after; a full disk stays no fuller.
            remove_leftovers(path, Bundle.open(path).manifest)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[Bundle]:
    """Open a bundle for one process at a time."""
    Bundle.open(path)
    with _storage_errors(path), locked(path / LOCK_FILE):
        yield Bundle.open(path)


@contextlib.contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's errors into one line about the bundle."""
    try:
        yield
    except OSError as error:
        if (full := storage_reason(error)) is not None:
            raise StorageFullError(f"{path}: cannot be written, {full}; it is as it was before") from error
        reason = describe_error(error)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            reason = "another process has written there meanwhile"
        raise BundleError(f"{path}: cannot be written, {reason}; it is as it was before") from error
