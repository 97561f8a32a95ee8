"""What an engine is: the sidecar ``KEY.json`` beside ``KEY.engine``. NVIDIA's file itself is never altered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vpdeploy.document import Document
from vpdeploy.engines.plan import FORMAT_VERSION, EnginePlan, take_optional
from vpdeploy.interface import Binding

FORMAT = "vpdeploy.engine"


@dataclass(frozen=True, kw_only=True)
class EngineCard(EnginePlan):
    """The sidecar of a built engine: its plan, and what came of it.

    Attributes:
        layout_digest: Of a bundle's layout; None for a folded model.
        inputs: By name.
        outputs: By name.
        size_bytes: Of the engine's file.
        sha256: Of the engine's file.
        build_seconds: How long the runtime's builder took.
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

    def oversize(self, sizes: Mapping[str, int]) -> str | None:
        """Return the first axis whose size the engine cannot take, in words, or None if all fit.

        Args:
            sizes: By axis name, e.g. a table's ``{"prefix": 16, "classes": 10, "slots": 64}``; others are ignored.
        """
        for axis, size in sizes.items():
            if axis in self.profile and not self.profile[axis].holds(size):
                return f"{axis} {size} is outside {self.profile[axis]} (min:opt:max)"
        return None

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
