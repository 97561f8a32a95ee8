"""What a target is given, and what it has to give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from vpdeploy.errors import BundleCorruptError
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.promptset import CompiledPromptSet
from vpdeploy.format.tensorfile import Tensors
from vpdeploy_export.onnx.save import save_model
from vpdeploy_export.parity import Answerer
from vpdeploy_export.precision.twins import wide_twin


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """Options of single targets; None is the target's default.

    Example:
        >>> options = vpdeploy_export.TargetOptions(name="classifier", max_batch=8)
        >>> vpdeploy_export.convert(bundle, Path("repository"), target="triton", options=options).path.name
        'classifier'

    Attributes:
        name: Of the model, where a target names it.
        max_batch: Images in one run at most.
        queue_delay_ms: How long a server waits for a batch to fill.
        device: ``auto``, ``cpu`` or ``gpu``.
        provider: ONNX Runtime's execution provider.
    """

    name: str | None = None
    max_batch: int | None = None
    queue_delay_ms: float | None = None
    device: str | None = None
    provider: str | None = None

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the options that were given."""
        return tuple(name for name, value in vars(self).items() if value is not None)


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A bundle to convert.

    Attributes:
        artifact: The bundle.
        prompt_sets: Its tasks, in its order.
        options: What was asked for.
        scratch: A folder for files that are not published.
    """

    artifact: Artifact
    prompt_sets: tuple[CompiledPromptSet, ...]
    options: TargetOptions
    scratch: Path

    def graph(self, *passes: ir.passes.InPlacePass) -> ir.Model:
        """Read the bundle's graph and rewrite it; every call gives a model of its own.

        Args:
            passes: What to run over it, in this order.

        Raises:
            BundleCorruptError: The graph is not the one that the manifest describes.
        """
        model = ir.load(self.artifact.graph_path)
        try:
            for each in passes:
                each(model)
        except ir.passes.PreconditionError as error:
            raise BundleCorruptError(f"{self.artifact.graph_path}: {error}; export again") from error
        return model

    def cpu_graph(self, path: Path) -> Path:
        """Return a written graph as the CPU provider can run it: itself, or a bfloat16 graph's float32 twin."""
        if self.artifact.precision != "bf16":
            return path
        twin = self.scratch / "twin.onnx"
        save_model(wide_twin(path), twin)
        return twin

    def tensors(self, prompt_set: CompiledPromptSet) -> Tensors:
        """Return a task's tensors for a table of one slot, not padded; a size of 0 becomes one masked column."""
        arrays = {}
        for spec in prompt_set.layout.tensors:
            array = prompt_set.tensors[spec.name]
            shape = tuple(max(1, size) for size in array.shape)
            row = np.full((1, *shape), spec.padding, dtype=spec.dtype)
            row[0][tuple(map(slice, array.shape))] = array
            arrays[spec.name] = row
        return arrays


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a target wrote.

    Attributes:
        graph: Facts of the graph: its file and whatever its user has to know.
        tasks: Facts of each task, by name.
        answerer: The result, from the written files alone.
        tolerance: How far its answers may be from the bundle's: a field of ``Tolerance``.
        next_step: A command or a file to read, for people.
    """

    graph: Mapping[str, Any]
    tasks: Mapping[str, Mapping[str, Any]]
    answerer: Answerer
    tolerance: float
    next_step: str


@dataclass(frozen=True, kw_only=True)
class Target:
    """A form that a bundle converts to.

    Attributes:
        takes: Names of the ``TargetOptions`` that mean something to it.
        destination: Returns the folder to write, from the bundle's path, ``--out`` and the options.
        check: Raises where a bundle cannot be converted here, before its prompt sets are read or anything is written.
        write: Writes all files but ``tasks.json`` into an empty folder.
    """

    takes: frozenset[str] = frozenset()
    destination: Callable[[Path, Path, TargetOptions], Path] = field(default=lambda bundle, out, options: out)
    check: Callable[[Artifact, TargetOptions], None] = field(default=lambda artifact, options: None)
    write: Callable[[Conversion, Path], Written]
