"""What decides an engine, the name of its files that follows from it, and the sidecar that says what came of it.

The sidecar is ``KEY.json`` beside ``KEY.engine``; NVIDIA's file itself is never altered.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vpdeploy.engines.profile import Profile
from vpdeploy.engines.toolkit import TOOLKITS, version_numbers
from vpdeploy.errors import BundleCorruptError
from vpdeploy.format.document import Document
from vpdeploy.format.graphfacts import Precision, take_precision
from vpdeploy.format.interface import Binding

FORMAT = "vpdeploy.engine"

FORMAT_VERSION = 1
"""The sidecar's format version; it is part of the key, so that an engine of another format is built anew."""

HARDWARE_LEVELS = ("none", "same-sm", "ampere+")
"""Which other GPUs than the one that built it a TensorRT engine runs on."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine was built.

    Attributes:
        version_compatible: Whether later versions of TensorRT load it.
        weight_stripped: Whether its weights are left out; they are taken from the graph when it is loaded.
        hardware: Which other GPUs load it, one of ``HARDWARE_LEVELS``.
        workspace_bytes: How many bytes of scratch memory its layers may use; None leaves the GPU's memory as the limit.
    """

    version_compatible: bool = False
    weight_stripped: bool = False
    hardware: str = "none"
    workspace_bytes: int | None = None

    def to_fields(self) -> dict[str, Any]:
        """Return the fields of the JSON form."""
        return {
            "version_compatible": self.version_compatible,
            "weight_stripped": self.weight_stripped,
            "hardware": self.hardware,
            "workspace_bytes": self.workspace_bytes,
        }

    @classmethod
    def from_document(cls, document: Document) -> EngineOptions:
        """Read the JSON form.

        Raises:
            BundleCorruptError: A field is missing or of another type.
        """
        hardware = document.take("hardware", str)
        if hardware not in HARDWARE_LEVELS:
            raise BundleCorruptError(f"{document.source}: unknown hardware level '{hardware}'")
        return cls(
            version_compatible=document.take("version_compatible", bool),
            weight_stripped=document.take("weight_stripped", bool),
            hardware=hardware,
            workspace_bytes=take_optional(document, "workspace_bytes", int),
        )


@dataclass(frozen=True, kw_only=True)
class EnginePlan:
    """Everything that decides what an engine will be. Equal plans have equal keys.

    Attributes:
        runtime: A key of ``vpdeploy.engines.toolkit.TOOLKITS``.
        runtime_version: The version of the module that builds, all of its numbers.
        targets: The GPU architectures it runs on, ascending, e.g. ``("sm_86", "sm_89")``.
        gpu_name: The GPU it was tuned on; None where no GPU takes part.
        platform: The operating system and processor it is bound to; None where it is bound to neither.
        precision: The precision of the graph's weights and matrix products.
        profile: The sizes that it takes.
        graph_sha256: The sha256 of the ONNX file that it is built from.
        options: How it is built.
    """

    runtime: str
    runtime_version: str
    targets: tuple[str, ...]
    gpu_name: str | None
    platform: str | None
    precision: Precision
    profile: Profile
    graph_sha256: str
    options: EngineOptions = field(default_factory=EngineOptions)

    def plan_fields(self) -> dict[str, Any]:
        """Return the fields of the JSON form that decide the engine."""
        return {
            "runtime": self.runtime,
            "runtime_version": self.runtime_version,
            "targets": list(self.targets),
            "gpu_name": self.gpu_name,
            "platform": self.platform,
            "precision": self.precision,
            "profile": self.profile.to_fields(),
            "graph_sha256": self.graph_sha256,
            "options": self.options.to_fields(),
        }

    @property
    def key(self) -> str:
        """Name of the engine's files: readable at the start, unique by a digest of every field at the end."""
        canonical = json.dumps({"format_version": FORMAT_VERSION, **self.plan_fields()}, sort_keys=True)
        digest = hashlib.sha256(canonical.encode()).hexdigest()[:12]
        version = ".".join(map(str, version_numbers(self.runtime_version)[:2]))
        return "-".join([self.runtime, version, *self.targets, self.precision, digest])

    @property
    def place(self) -> str:
        """The GPUs it is for, in words, for one-line messages."""
        targets = ", ".join(self.targets)
        return f"{self.gpu_name} ({targets})" if self.gpu_name else targets

    @classmethod
    def plan_from_document(cls, document: Document) -> EnginePlan:
        """Read the JSON form.

        Raises:
            BundleCorruptError: A field is missing or of another type.
        """
        runtime = document.take("runtime", str)
        if runtime not in TOOLKITS:
            raise BundleCorruptError(f"{document.source}: unknown runtime '{runtime}'")
        return EnginePlan(
            runtime=runtime,
            runtime_version=document.take("runtime_version", str),
            targets=tuple(document.take_list("targets", str)),
            gpu_name=take_optional(document, "gpu_name", str),
            platform=take_optional(document, "platform", str),
            precision=take_precision(document),
            profile=Profile.from_document(document.nested("profile")),
            graph_sha256=document.take("graph_sha256", str),
            options=EngineOptions.from_document(document.nested("options")),
        )


def take_optional(document: Document, name: str, kind: type[Any]) -> Any:
    """Return a field that may be null, checked if it is not."""
    return None if document.fields.get(name) is None else document.take(name, kind)


@dataclass(frozen=True, kw_only=True)
class EngineCard(EnginePlan):
    """The sidecar of a built engine: its plan, and what came of it.

    Attributes:
        layout_digest: The digest of the bundle's layout; None for a folded model.
        inputs: The engine's inputs by name.
        outputs: The engine's outputs by name.
        size_bytes: The size of the engine's file.
        sha256: The sha256 of the engine's file.
        build_seconds: How many seconds the runtime's builder took.
    """

    layout_digest: str | None
    inputs: Mapping[str, Binding]
    outputs: Mapping[str, Binding]
    size_bytes: int
    sha256: str
    build_seconds: float

    @classmethod
    def of(cls, plan: EnginePlan, **facts: Any) -> EngineCard:
        """Return the card of an engine that was built by a plan; ``facts`` are the fields that the plan has not."""
        return cls(**vars(plan), **facts)

    def to_fields(self) -> dict[str, Any]:
        """Return the fields of the JSON form."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **self.plan_fields(),
            "layout_digest": self.layout_digest,
            "inputs": {name: each.to_fields() for name, each in self.inputs.items()},
            "outputs": {name: each.to_fields() for name, each in self.outputs.items()},
            "size_bytes": self.size_bytes,
            "sha256": self.sha256,
            "build_seconds": self.build_seconds,
        }

    @classmethod
    def from_document(cls, document: Document) -> EngineCard:
        """Read the JSON form.

        Raises:
            BundleCorruptError: A field is missing, of another type, or contradicts another.
            BundleVersionError: It was written in another format version.
        """
        document.expect_format(FORMAT, FORMAT_VERSION)
        inputs, outputs = document.nested("inputs"), document.nested("outputs")
        return cls.of(
            EnginePlan.plan_from_document(document),
            layout_digest=take_optional(document, "layout_digest", str),
            inputs={name: Binding.from_document(inputs.nested(name)) for name in inputs.fields},
            outputs={name: Binding.from_document(outputs.nested(name)) for name in outputs.fields},
            size_bytes=document.take("size_bytes", int),
            sha256=document.take("sha256", str),
            build_seconds=document.take("build_seconds", float),
        )
