"""Changing what is served while it is served. Every protocol asks here, from a thread that may wait."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vpdeploy.errors import BundleError, InputError, LayoutMismatchError, TaskNotFoundError
from vpdeploy.format.bundle import (
    Bundle,
    Condition,
    check_version,
    publish_tasks,
    read_consistently,
    roll_back_task,
    withdraw_task,
)
from vpdeploy.format.document import Document
from vpdeploy.format.manifest import TaskEntry
from vpdeploy.format.promptset import CARD_FILE, FORMAT, TENSOR_FILE, CompiledPromptSet
from vpdeploy.format.run import FORMAT as RUN_FORMAT
from vpdeploy.format.task import check_task_name
from vpdeploy.server.access import Grant, Scope
from vpdeploy.server.recompiling import RunCompiler
from vpdeploy.text import cut_name

_log = logging.getLogger(__name__)


class FollowingSession(Protocol):
    """What changing tasks needs of a session."""

    def sync(self) -> object:
        """Bring the loaded tasks in line with the bundle on disk."""
        ...

    def load_task(self, task: str) -> None:
        """Serve a task as the bundle on disk has it now."""
        ...

    def unload_task(self, task: str) -> None:
        """Serve a task of the bundle no longer, until it is loaded."""
        ...


@dataclass(frozen=True, kw_only=True)
class KeptVersion:
    """One version of a task in the bundle.

    Attributes:
        version: Its number.
        served: Whether it is the one that is served.
        classes: Its classes; None where it is damaged.
        val_accuracy: Its accuracy on the validation images of its training; None where it is not known.
        size_bytes: Bytes of its tensors; None where it is damaged.
        damage: What is wrong with it; None where nothing is.
    """

    version: int
    served: bool
    classes: int | None = None
    val_accuracy: float | None = None
    size_bytes: int | None = None
    damage: str | None = None


class Administration:
    """Publishes, withdraws and rolls back tasks of a bundle, as the command line does, and has them served at once.

    Args:
        bundle: The bundle's folder.
        session: The session that serves it.
        compiler: Compiles runs.
    """

    def __init__(self, bundle: Path, session: FollowingSession, *, compiler: RunCompiler | None = None) -> None:
        self._path = bundle
        self._session = session
        self._compiler = compiler or RunCompiler()
        self._following = threading.Lock()

    def tasks(self, grant: Grant) -> dict[str, list[KeptVersion]]:
        """Return the tasks that exist for a token, each with the versions that are kept.

        Raises:
            ForbiddenError: The token is not good for this.
            BundleError: The bundle cannot be read.
        """
        grant.require(Scope.ADMIN)

        def read() -> dict[str, list[KeptVersion]]:
            bundle = Bundle.open(self._path)
            entries = bundle.manifest.tasks
            return {name: _versions(bundle, name, entries[name]) for name in entries if grant.covers(name)}

        return read_consistently(self._path, read)

    def publish(
        self, grant: Grant, task: str, files: Mapping[str, bytes], *, condition: Condition | None = None
    ) -> int:
        """Publish a new version of a task, or a new task.

        Args:
            grant: What the request may do.
            task: The task's name.
            files: The files of a compiled prompt set, or of a run, which is compiled first.
            condition: What the task's version must be.

        Returns:
            The version that is now served.

        Raises:
            ForbiddenError: The token is not good for this.
            TaskNotFoundError: The task does not exist for the token.
            SpecError: It is no name of a task.
            InputError: The files cannot be used.
            LayoutMismatchError: The task does not fit the bundle.
            VersionConflictError: The task is at another version than the condition says.
            MissingExtraError: It is a run, and this installation cannot compile it.
            BundleError: The bundle cannot be written; it is as it was.
        """
        self._require(grant, task)
        check_task_name(task)
        bundle = Bundle.open(self._path)
        check_version(bundle.manifest, task, condition)  # and once more when it is published: compiling takes a while
        prompt_set = self._prompt_set(bundle, task, files)
        graph_sha256 = bundle.manifest.graph_sha256
        versions = publish_tasks(self._path, [prompt_set], graph_sha256=graph_sha256, condition=condition)
        self._follow(grant, f"published version {versions[task]} of task {task}")
        return versions[task]

    def withdraw(self, grant: Grant, task: str, *, condition: Condition | None = None) -> list[int]:
        """Remove a task and its versions.

        Returns:
            The versions that are gone.

        Raises:
            ForbiddenError: The token is not good for this.
            TaskNotFoundError: There is no such task, or it does not exist for the token.
            VersionConflictError: The task is at another version than the condition says.
            BundleError: The bundle cannot be written; it is as it was.
        """
        self._require(grant, task)
        versions = withdraw_task(self._path, task, condition=condition)
        self._follow(grant, f"withdrew task {task}")
        return versions

    def roll_back(self, grant: Grant, task: str, *, condition: Condition | None = None) -> int:
        """Serve a task's previous version again.

        Returns:
            The version that is now served.

        Raises:
            ForbiddenError: The token is not good for this.
            TaskNotFoundError: There is no such task, or it does not exist for the token.
            SpecError: There is no earlier version.
            VersionConflictError: The task is at another version than the condition says.
            BundleError: The bundle cannot be written, or the earlier version is damaged; it is as it was.
        """
        self._require(grant, task)
        version = roll_back_task(self._path, task, condition=condition)
        self._follow(grant, f"rolled task {task} back to version {version}")
        return version

    def load(self, grant: Grant, task: str) -> None:
        """Serve a task as the bundle has it now, also one that was unloaded.

        Raises:
            ForbiddenError: The token is not good for this.
            TaskNotFoundError: There is no such task, or it does not exist for the token.
            BundleError: The bundle, or this task of it, is damaged.
        """
        self._require(grant, task)
        with self._following:
            self._session.load_task(task)
        _log.info("%s loaded task %s", grant.name, task)

    def unload(self, grant: Grant, task: str) -> None:
        """Serve a task no longer until it is loaded, or the server starts anew; the bundle keeps it.

        Raises:
            ForbiddenError: The token is not good for this.
            TaskNotFoundError: There is no such task, or it does not exist for the token.
        """
        self._require(grant, task)
        with self._following:
            self._session.unload_task(task)
        _log.info("%s unloaded task %s", grant.name, task)

    def close(self) -> None:
        """End what takes long."""
        self._compiler.close()

    def _require(self, grant: Grant, task: str) -> None:
        grant.require(Scope.ADMIN)
        if not grant.covers(task):
            raise TaskNotFoundError("no such task for this token")

    def _follow(self, grant: Grant, what: str) -> None:
        """Have a change served now, not at the next look; what fails is shown with the tasks, as at every look."""
        _log.info("%s %s", grant.name, what)
        try:
            with self._following:
                self._session.sync()
        except (BundleError, LayoutMismatchError) as error:
            _log.error("the change is published, and not served yet: %s", " ".join(str(error).split()))

    def _prompt_set(self, bundle: Bundle, task: str, files: Mapping[str, bytes]) -> CompiledPromptSet:
        """Read the files, which are a prompt set's or a run's."""
        try:
            card = Document.parse(files[CARD_FILE].decode(errors="replace"), source=CARD_FILE)
            kind, name = card.take("format", str), card.nested("task").take("name", str)
            if name != task:
                raise InputError(f"the archive holds task '{cut_name(name)}', asked for is '{task}'; name it alike")
            if kind == FORMAT and TENSOR_FILE in files:
                return CompiledPromptSet.decode(dict(files), folder=Path())
        except (BundleError, LayoutMismatchError) as error:  # the archive's: it is not compared with the bundle yet
            raise InputError(str(error)) from None
        if kind == RUN_FORMAT:
            return self._compiler.compile(bundle, files)
        if kind == FORMAT:
            raise InputError(f"the archive holds no {TENSOR_FILE} beside its {CARD_FILE}; pack it again")
        raise InputError(f"{CARD_FILE}: expected format '{FORMAT}' or '{RUN_FORMAT}', found '{kind[:40]}'")


def _versions(bundle: Bundle, task: str, entry: TaskEntry) -> list[KeptVersion]:
    kept = []
    for version in sorted(entry.files):
        served = version == entry.version
        try:
            prompt_set = bundle.read_task(task, version)
        except (BundleError, LayoutMismatchError) as error:
            kept.append(KeptVersion(version=version, served=served, damage=" ".join(str(error).split())))
            continue
        metrics: Any = prompt_set.card.details.get("metrics")
        accuracy = metrics.get("val_accuracy") if isinstance(metrics, dict) else None
        kept.append(
            KeptVersion(
                version=version,
                served=served,
                classes=len(prompt_set.card.labels),
                val_accuracy=accuracy if isinstance(accuracy, float) else None,
                size_bytes=prompt_set.size_bytes,
            )
        )
    return kept
