"""A bundle's manifest: what the folder holds, with the sha256 of every file."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

from vpdeploy.errors import BundleCorruptError, LayoutMismatchError, SpecError, TaskNotFoundError
from vpdeploy.format.datafile import DataFile
from vpdeploy.format.document import Document
from vpdeploy.format.graphfacts import GraphFacts, take_details, take_precision
from vpdeploy.format.layout import Layout
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy.format.promptset import CompiledPromptSet
from vpdeploy.format.task import BackboneId, TaskCard, check_task_name
from vpdeploy.text import differing

MANIFEST_FILE = "manifest.json"
GRAPH_FILE = "model.onnx"
TASKS_FOLDER = "tasks"
ENGINES_FOLDER = "engines"
FORMAT = "vpdeploy.bundle"
FORMAT_VERSION = 3
"""Version 2 records the form of the image input; of version 1 it is uint8, the only one that bundles had.

Version 3 records the last versions of tasks that were withdrawn.
"""

_GRAPH_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\.onnx")
VERSION_NAME = re.compile(r"[1-9][0-9]{0,8}")
"""What the folder of a version is called."""


@dataclass(frozen=True, kw_only=True)
class TaskEntry:
    """One task in a bundle.

    Attributes:
        version: The published version that is served.
        files: sha256 of each file of each kept version: ``{version: {file name: sha256}}``.
    """

    version: int
    files: dict[int, dict[str, str]]

    @property
    def served(self) -> dict[str, str]:
        """sha256 of each file of the served version."""
        return self.files[self.version]

    @property
    def previous_version(self) -> int | None:
        """The version that a roll-back returns to, or None."""
        return max((version for version in self.files if version < self.version), default=None)


@dataclass(frozen=True, kw_only=True)
class BundleFacts:
    """What all tasks of a bundle share, known before any of its files is written.

    Attributes:
        backbone: The frozen ViT.
        preprocessing: One for all tasks.
        layout: The layout of the table inputs and of every compiled prompt set.
        graph: What is recorded of the switchable graph.
    """

    backbone: BackboneId
    preprocessing: Preprocessing
    layout: Layout
    graph: GraphFacts

    def check_fit(self, prompt_set: CompiledPromptSet) -> None:
        """Check that the graph can switch to a prompt set.

        Raises:
            LayoutMismatchError: The task belongs to another backbone, preprocessing or layout; the message says which.
        """
        self.check_card(prompt_set.card)
        if prompt_set.layout.digest != self.layout.digest:
            mine, other = differing(prompt_set.layout.digest, self.layout.digest)
            raise LayoutMismatchError(
                f"task '{prompt_set.card.name}' has layout {mine}, the bundle's graph {other}; "
                "export the run again for this bundle"
            )

    def check_card(self, card: TaskCard) -> None:
        """Check that a task belongs to this backbone and preprocessing.

        Raises:
            LayoutMismatchError: The task belongs to another backbone or preprocessing; the message says which.
        """
        if card.backbone.sha256 != self.backbone.sha256:
            mine, other = differing(card.backbone.sha256, self.backbone.sha256)
            raise LayoutMismatchError(
                f"task '{card.name}' belongs to backbone {card.backbone.name} ({mine}), "
                f"the bundle to {self.backbone.name} ({other})"
            )
        if difference := card.preprocessing.difference(self.preprocessing):
            raise LayoutMismatchError(f"task '{card.name}' is preprocessed unlike the bundle: {difference}")


@dataclass(frozen=True, kw_only=True)
class Manifest(BundleFacts):
    """What a bundle holds: the facts that its tasks share, and its files.

    Attributes:
        graph_sha256: sha256 of the ONNX file; it embeds its data file's digest, so this one identifies both.
        graph_file: Its name in the bundle: ``model.onnx``, or another one where an export replaced a live graph.
        graph_data: The file beside it that holds its weights; None where the ONNX file holds them.
        tasks: The tasks by name, in the order in which they were added.
        withdrawn: The last version of each task that was there once, by name: a version means one prompt set for ever,
            so a task that comes again goes on counting.
    """

    graph_sha256: str
    graph_file: str = GRAPH_FILE
    graph_data: DataFile | None = None
    tasks: dict[str, TaskEntry] = field(default_factory=dict)
    withdrawn: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, facts: BundleFacts, *, graph_sha256: str, graph_data: DataFile | None) -> Manifest:
        """Return the manifest of a bundle that holds a graph and no task yet."""
        return cls(
            backbone=facts.backbone,
            preprocessing=facts.preprocessing,
            layout=facts.layout,
            graph=facts.graph,
            graph_sha256=graph_sha256,
            graph_data=graph_data,
        )

    def entry(self, task: str) -> TaskEntry:
        """Return one task's entry.

        Raises:
            TaskNotFoundError: The bundle holds no such task.
        """
        if task not in self.tasks:
            known = ", ".join(self.tasks) or "none"
            raise TaskNotFoundError(f"no task '{task}' in the bundle; it holds: {known}")
        return self.tasks[task]

    def last_version(self, task: str) -> int:
        """Return the last version that a task was published in, 0 where there was none."""
        return max(self.tasks[task].files) if task in self.tasks else self.withdrawn.get(task, 0)

    def with_task(self, task: str, entry: TaskEntry) -> Manifest:
        """Return a copy in which ``task`` has the given entry."""
        withdrawn = {name: version for name, version in self.withdrawn.items() if name != task}
        return replace(self, tasks={**self.tasks, task: entry}, withdrawn=withdrawn)

    def without_task(self, task: str) -> Manifest:
        """Return a copy that does not hold ``task``, and remembers its last version."""
        tasks = {name: entry for name, entry in self.tasks.items() if name != task}
        return replace(self, tasks=tasks, withdrawn={**self.withdrawn, task: self.last_version(task)})

    def without_tasks(self) -> Manifest:
        """Return a copy that holds no task, and remembers the last version of each."""
        last = {name: self.last_version(name) for name in self.tasks}
        return replace(self, tasks={}, withdrawn={**self.withdrawn, **last})

    def to_fields(self) -> dict[str, Any]:
        """Return the fields of the JSON form."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "backbone": self.backbone.to_fields(),
            "preprocessing": self.preprocessing.to_fields(),
            "graph": {
                "file": self.graph_file,
                "sha256": self.graph_sha256,
                **({"data": self.graph_data.to_fields()} if self.graph_data is not None else {}),
                **self.graph.to_fields(),
            },
            "layout": self.layout.to_fields(),
            "tasks": {
                name: {
                    "version": entry.version,
                    "files": {str(version): files for version, files in sorted(entry.files.items())},
                }
                for name, entry in self.tasks.items()
            },
            "withdrawn": self.withdrawn,
        }

    @classmethod
    def from_document(cls, document: Document) -> Manifest:
        """Read the JSON form.

        Raises:
            BundleCorruptError: A field is missing, of another type, or contradicts another.
            BundleVersionError: It was written in another format version.
        """
        version = document.expect_format(FORMAT, 1, 2, FORMAT_VERSION)
        graph = document.nested("graph")
        facts = _facts_of_version_1(graph) if version == 1 else GraphFacts.from_document(graph)
        graph_file = graph.take("file", str)
        if not _GRAPH_FILE.fullmatch(graph_file):
            raise BundleCorruptError(f"{graph.source}: '{graph_file}' is not the name of a file in the bundle")
        entries = document.nested("tasks")
        withdrawn = {} if version < 3 else _withdrawn(document.nested("withdrawn"), entries)
        return cls(
            backbone=BackboneId.from_document(document.nested("backbone")),
            preprocessing=Preprocessing.from_document(document.nested("preprocessing")),
            layout=Layout.from_document(document.nested("layout")),
            graph=facts,
            graph_sha256=graph.take("sha256", str),
            graph_file=graph_file,
            graph_data=DataFile.from_document(graph.nested("data")) if "data" in graph.fields else None,
            tasks={_task_name(name, entries): _task_entry(entries.nested(name)) for name in entries.fields},
            withdrawn=withdrawn,
        )


def _facts_of_version_1(graph: Document) -> GraphFacts:
    """Read the section ``graph`` of version 1, whose graphs all take uint8 images."""
    return GraphFacts(
        precision=take_precision(graph),
        opset=graph.take("opset", int),
        image_input="uint8",
        details=take_details(graph, "details"),
    )


def _task_name(name: str, document: Document) -> str:
    """Return a task's name after checking that it cannot lead out of the bundle's folder."""
    try:
        return check_task_name(name)
    except SpecError as error:
        raise BundleCorruptError(f"{document.source}: {error}") from None


def _withdrawn(document: Document, tasks: Document) -> dict[str, int]:
    """Read the last versions of tasks that the bundle no longer holds."""
    last = {_task_name(name, document): document.take(name, int) for name in document.fields}
    for name, version in last.items():
        if not VERSION_NAME.fullmatch(str(version)):
            raise BundleCorruptError(f"{document.source}: the last version of '{name}' should be a number from 1")
        if name in tasks.fields:
            raise BundleCorruptError(f"{document.source}: task '{name}' is in the bundle")
    return last


def _task_entry(document: Document) -> TaskEntry:
    """Read one task's entry and check that the served version is among the kept ones."""
    files = document.nested("files")
    if not all(VERSION_NAME.fullmatch(version) for version in files.fields):
        raise BundleCorruptError(f"{files.source}: versions should be numbers from 1")
    versions = {int(version): dict(files.take(version, dict)) for version in files.fields}
    entry = TaskEntry(version=document.take("version", int), files=versions)
    if entry.version not in versions:
        raise BundleCorruptError(f"{document.source}: version {entry.version} is served but not listed")
    return entry
