"""What ``vpdeploy export`` writes, read and verified: a bundle, or a folded model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from vpdeploy.errors import BundleError, SpecError, TaskNotFoundError
from vpdeploy.files import sha256_of_file
from vpdeploy.format.bundle import Bundle, is_bundle
from vpdeploy.format.datafile import DataFile, data_file_of
from vpdeploy.format.folded import FoldedCard
from vpdeploy.format.graphfacts import GraphFacts, ImageInput, Precision
from vpdeploy.format.interface import Interface
from vpdeploy.format.layout import Layout
from vpdeploy.format.manifest import ENGINES_FOLDER, BundleFacts
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy.format.promptset import CompiledPromptSet
from vpdeploy.format.task import BackboneId, TaskCard

ENGINE_SUFFIX = ".engine"


@dataclass(frozen=True, kw_only=True)
class HeldTasks:
    """Tasks that are in memory, not in a bundle's folder.

    Attributes:
        cards: What is known of them, in order.
        prompt_sets: One for each card; empty for a folded model, whose prompts are constants of its graph.
    """

    cards: tuple[TaskCard, ...]
    prompt_sets: tuple[CompiledPromptSet, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A bundle or a folded model: its graph, what is recorded of it, and its tasks.

    Its graph was compared with what is recorded of it when the artifact was opened. Prompt sets are read when they are
    asked for, each time anew: a bundle can have a thousand of them, whoever serves them keeps them in a table, and
    building an engine needs their sizes only. As the manifest that was read names the sha256 of every file, a prompt
    set that is read later is the one of then or an error.

    Attributes:
        path: What the user names: the bundle's folder or the folded file.
        graph_path: The ONNX file.
        graph: What is recorded of the graph.
        data: The file beside the graph that holds its weights; None where the ONNX file holds them.
        backbone: The frozen ViT.
        preprocessing: One for all tasks.
        layout: The layout of the table's inputs; None for a folded model, which has no table.
        source: Where the tasks come from: a bundle's folder, or memory.
    """

    path: Path
    graph_path: Path
    graph: GraphFacts
    data: DataFile | None
    backbone: BackboneId
    preprocessing: Preprocessing
    layout: Layout | None
    source: Bundle | HeldTasks

    @classmethod
    def open(cls, path: Path) -> Artifact:
        """Read a bundle folder or a folded ONNX file.

        A bundle's graph is compared with its manifest, a data file with what the graph says of it.

        Raises:
            BundleError: The path is neither, or a file of it is damaged, foreign or of another version.
        """
        if path.is_file():
            if path.suffix == ENGINE_SUFFIX:
                raise BundleError(f"{path}: is an engine; {_engine_advice(path)}")
            if path.suffix != ".onnx":
                raise BundleError(f"{path}: not an .onnx file; expected one written by vpdeploy export")
            card, data = FoldedCard.read(path), data_file_of(path)
            if data is not None:
                data.verify(path.parent)
            return cls.of_folded(path, card, data=data)
        if not is_bundle(path):
            state = "does not exist" if not path.exists() else "is neither"
            raise BundleError(f"{path}: {state}; expected a bundle folder or an .onnx file of vpdeploy export")
        return cls.of_bundle(Bundle.open(path))

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> Artifact:
        """Return a bundle after comparing its graph's bytes with the manifest.

        Raises:
            BundleCorruptError: The graph is missing or was changed.
        """
        bundle.verified_graph()
        return cls.of_manifest(bundle)

    @classmethod
    def of_manifest(cls, bundle: Bundle) -> Artifact:
        """Return a bundle as its manifest tells it, to describe it: its graph may be damaged."""
        manifest = bundle.manifest
        return cls(
            path=bundle.path,
            graph_path=bundle.path / manifest.graph_file,
            graph=manifest.graph,
            data=manifest.graph_data,
            backbone=manifest.backbone,
            preprocessing=manifest.preprocessing,
            layout=manifest.layout,
            source=bundle,
        )

    @classmethod
    def of_folded(cls, path: Path, card: FoldedCard, *, data: DataFile | None = None) -> Artifact:
        """Return the folded model of a file that says, or is going to say, this of itself.

        Args:
            path: The ONNX file; its metadata are not read.
            card: What the file's metadata say.
            data: The file beside it that holds its weights, or None.
        """
        return cls(
            path=path,
            graph_path=path,
            graph=card.graph,
            data=data,
            backbone=card.task.backbone,
            preprocessing=card.task.preprocessing,
            layout=None,
            source=HeldTasks(cards=(card.task,)),
        )

    @classmethod
    def of_staged(
        cls, path: Path, facts: BundleFacts, prompt_sets: Sequence[CompiledPromptSet], *, data: DataFile | None = None
    ) -> Artifact:
        """Return a switchable graph that no bundle holds yet, with prompt sets in memory.

        Args:
            path: The ONNX file.
            facts: What the bundle's manifest is going to say.
            prompt_sets: The tasks, in the order of their slots.
            data: The graph's data file, or None.

        Raises:
            LayoutMismatchError: A prompt set does not fit the graph.
        """
        artifact = cls(
            path=path,
            graph_path=path,
            graph=facts.graph,
            data=data,
            backbone=facts.backbone,
            preprocessing=facts.preprocessing,
            layout=facts.layout,
            source=HeldTasks(cards=()),
        )
        return artifact.with_prompt_sets(prompt_sets)

    @property
    def precision(self) -> Precision:
        """Type of the graph's weights and matrix products."""
        return self.graph.precision

    @property
    def opset(self) -> int:
        """ONNX opset of the graph."""
        return self.graph.opset

    @property
    def image_input(self) -> ImageInput:
        """Form of the graph's ``image`` input."""
        return self.graph.image_input

    @property
    def is_switchable(self) -> bool:
        """Whether the graph switches between the prompt sets of a table; a folded model holds one task."""
        return self.layout is not None

    @property
    def bundle(self) -> Bundle | None:
        """The folder that a session follows; None of a folded model, and where the prompt sets are in memory."""
        return self.source if isinstance(self.source, Bundle) else None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of their slots."""
        return self.source.tasks if isinstance(self.source, Bundle) else tuple(card.name for card in self.source.cards)

    @property
    def versions(self) -> Mapping[str, int]:
        """The published version of each task; empty where none was published."""
        return self.source.versions if isinstance(self.source, Bundle) else {}

    @cached_property
    def sha256(self) -> str:
        """sha256 of the ONNX file; it embeds its data file's digest, so this one identifies both."""
        return self.bundle.manifest.graph_sha256 if self.bundle is not None else sha256_of_file(self.graph_path)

    @property
    def graph_bytes(self) -> int:
        """Bytes of the ONNX file and its data file."""
        return self.graph_path.stat().st_size + (0 if self.data is None else self.data.size_bytes)

    @property
    def engines_folder(self) -> Path:
        """Where engines built from the graph lie."""
        return self.graph_path.parent / ENGINES_FOLDER

    @cached_property
    def interface(self) -> Interface:
        """The graph's inputs and outputs, with names for dynamic axes."""
        side = self.preprocessing.image_size
        if self.layout is not None:
            return Interface.of_switchable(self.layout, self.image_input, side)
        (card,) = self.cards.values()
        return Interface.of_folded(len(card.labels), self.image_input, side)

    @cached_property
    def cards(self) -> Mapping[str, TaskCard]:
        """What is known of each task, by name; of a bundle, its prompt sets are read for it.

        Raises:
            BundleError: A prompt set is damaged, or gone.
            LayoutMismatchError: One does not fit the graph.
        """
        if isinstance(self.source, Bundle):
            return {task: self.read_prompt_set(task).card for task in self.tasks}
        return {card.name: card for card in self.source.cards}

    def read_prompt_set(self, task: str) -> CompiledPromptSet:
        """Return one task's prompt set.

        Raises:
            TaskNotFoundError: There is no such task, or it is folded into the graph.
            BundleError: The prompt set is damaged, or gone.
            LayoutMismatchError: It does not fit the graph.
        """
        if isinstance(self.source, Bundle):
            return self.source.read_task(task)
        for prompt_set in self.source.prompt_sets:
            if prompt_set.card.name == task:
                return prompt_set
        raise TaskNotFoundError(f"{self.path}: holds no prompt set of a task '{task}'")

    def read_prompt_sets(self) -> tuple[CompiledPromptSet, ...]:
        """Return all prompt sets in the order of their slots; none of a folded model.

        Raises:
            BundleError: One is damaged, or gone.
            LayoutMismatchError: One does not fit the graph.
        """
        if isinstance(self.source, Bundle):
            return tuple(self.source.read_task(task) for task in self.tasks)
        return self.source.prompt_sets

    def check_fit(self, prompt_set: CompiledPromptSet) -> None:
        """Check that the graph can switch to a prompt set.

        Raises:
            SpecError: This is a folded model.
            LayoutMismatchError: It belongs to another backbone, preprocessing or layout; the message says which.
        """
        if self.layout is None:
            raise SpecError("a folded model holds one task; export a bundle to switch between several")
        facts = BundleFacts(
            graph=self.graph, backbone=self.backbone, preprocessing=self.preprocessing, layout=self.layout
        )
        facts.check_fit(prompt_set)

    def with_prompt_sets(self, prompt_sets: Sequence[CompiledPromptSet]) -> Artifact:
        """Return the same graph with other tasks, in memory; a session of it follows no bundle.

        Args:
            prompt_sets: The tasks' prompt sets, in the order of their slots.

        Raises:
            SpecError: This is a folded model.
            LayoutMismatchError: A prompt set does not fit the graph.
        """
        for prompt_set in prompt_sets:
            self.check_fit(prompt_set)
        held = HeldTasks(cards=tuple(each.card for each in prompt_sets), prompt_sets=tuple(prompt_sets))
        return replace(self, source=held)


def _engine_advice(path: Path) -> str:
    """Say what to give instead of an engine: it has no labels and no prompts, the artifact beside it has."""
    home = path.parent.parent
    if path.parent.name == ENGINES_FOLDER and is_bundle(home):
        return f"give its bundle, {home}, which runs it where it fits"
    return "give the bundle's folder, or the .onnx file, that it was built from"
