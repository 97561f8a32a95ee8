"""What is known of a task: the card that travels with its prompt set from training to the server."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vpdeploy.errors import BundleCorruptError, SpecError
from vpdeploy.format.document import Document
from vpdeploy.format.preprocessing import Preprocessing

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Consecutive blocks of the same sizes; a plain ViT is one stage.

    Attributes:
        depth: Blocks in the stage.
        width: Token width, D.
        heads: Attention heads, H.
    """

    depth: int
    width: int
    heads: int

    @property
    def head_width(self) -> int:
        """Width of one head, d = D / H."""
        return self.width // self.heads


@dataclass(frozen=True, kw_only=True)
class BackboneId:
    """Which frozen ViT a prompt set belongs to.

    Attributes:
        name: Architecture, as timm names it.
        sha256: Digest over the names, shapes and values of its tensors.
        depth: Blocks, L, of all stages.
        width: Width of the feature that the head reads, D.
        heads: Attention heads of the last block, H.
        patch_size: Side of a patch, in pixels.
        hierarchy: The stages, where blocks differ in size; empty for a plain ViT.
    """

    name: str
    sha256: str
    depth: int
    width: int
    heads: int
    patch_size: int
    hierarchy: tuple[Stage, ...] = ()

    @property
    def head_width(self) -> int:
        """Width of one head, d = D / H."""
        return self.width // self.heads

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages; one for a plain ViT."""
        return self.hierarchy or (Stage(depth=self.depth, width=self.width, heads=self.heads),)

    def to_fields(self) -> dict[str, Any]:
        """Return the fields of the JSON form; ``stages`` only where there are several."""
        fields: dict[str, Any] = {
            "name": self.name,
            "sha256": self.sha256,
            "depth": self.depth,
            "width": self.width,
            "heads": self.heads,
            "patch_size": self.patch_size,
        }
        if self.hierarchy:
            fields["stages"] = [
                {"depth": stage.depth, "width": stage.width, "heads": stage.heads} for stage in self.hierarchy
            ]
        return fields

    @classmethod
    def from_document(cls, document: Document) -> BackboneId:
        """Read the JSON form.

        Raises:
            BundleCorruptError: A field is missing, of another type, or out of range.
        """
        listed = document.take_list("stages", dict) if "stages" in document.fields else []
        entries = [Document(f"{document.source}: stages[{index}]", fields) for index, fields in enumerate(listed)]
        backbone = cls(
            name=document.take("name", str),
            sha256=document.take("sha256", str),
            depth=document.take("depth", int),
            width=document.take("width", int),
            heads=document.take("heads", int),
            patch_size=document.take("patch_size", int),
            hierarchy=tuple(
                Stage(depth=entry.take("depth", int), width=entry.take("width", int), heads=entry.take("heads", int))
                for entry in entries
            ),
        )
        sizes = [backbone.depth, backbone.width, backbone.heads, backbone.patch_size]
        sizes += [size for stage in backbone.stages for size in (stage.depth, stage.width, stage.heads)]
        possible = min(sizes) >= 1 and all(stage.width % stage.heads == 0 for stage in backbone.stages)
        if not possible or sum(stage.depth for stage in backbone.stages) != backbone.depth:
            raise BundleCorruptError(f"{document.source}: impossible backbone dimensions {document.fields}")
        return backbone


@dataclass(frozen=True, kw_only=True)
class TaskCard:
    """One task, without its tensors.

    Attributes:
        name: The task's name: 1 to 64 letters, digits, dots, underscores and dashes.
        labels: Class names; index = class.
        method: How its prompts were learned, e.g. ``e2vpt``.
        backbone: The frozen ViT it needs.
        preprocessing: How its images are brought to the backbone's input.
        details: Free-form sections for people and reports, such as ``hyperparameters``, ``metrics``, ``pruning``,
            ``prompts`` and ``parity``; nothing is computed from them.
    """

    name: str
    labels: tuple[str, ...]
    method: str
    backbone: BackboneId
    preprocessing: Preprocessing
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_fields(self) -> dict[str, Any]:
        """Return the fields of the JSON form."""
        return {
            "name": self.name,
            "method": self.method,
            "labels": list(self.labels),
            "backbone": self.backbone.to_fields(),
            "preprocessing": self.preprocessing.to_fields(),
            "details": dict(self.details),
        }

    @classmethod
    def from_document(cls, document: Document) -> TaskCard:
        """Read the JSON form.

        Raises:
            BundleCorruptError: A field is missing or of another type, or the name or labels are unusable.
        """
        name = document.take("name", str)
        labels = tuple(document.take_list("labels", str))
        if not _NAME.fullmatch(name):
            raise BundleCorruptError(f"{document.source}: '{name}' is not a task name")
        if not labels:
            raise BundleCorruptError(f"{document.source}: field 'labels' is empty")
        return cls(
            name=name,
            labels=labels,
            method=document.take("method", str),
            backbone=BackboneId.from_document(document.nested("backbone")),
            preprocessing=Preprocessing.from_document(document.nested("preprocessing")),
            details=document.take("details", dict),
        )


_REFERENCE = re.compile(r"([^@]+)@([1-9][0-9]{0,8})")


def split_reference(reference: str) -> tuple[str, int | None]:
    """Return which task is meant, and which version: ``flowers@2`` is version 2, ``flowers`` the one that is served."""
    found = _REFERENCE.fullmatch(reference)
    return (reference, None) if found is None else (found[1], int(found[2]))


def check_task_name(name: str) -> str:
    """Return ``name`` if it can name a task.

    Raises:
        SpecError: It holds other characters, or is too long.
    """
    if not _NAME.fullmatch(name):
        raise SpecError(
            f"'{name}' cannot name a task: expected 1 to 64 letters, digits, '.', '_' or '-', "
            "starting with a letter or digit"
        )
    return name
