"""What a format of the public code is: how to know it, and how to turn its prompts into a method of ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vpdeploy_train.importing.checkpoint import Checkpoint
from vpdeploy_train.methods.method import PromptDimensions, PromptMethod


@dataclass(frozen=True, kw_only=True)
class ImportedPrompts:
    """A prompt set in our form.

    Attributes:
        method: Its name in ``vpdeploy_train.methods.METHODS``.
        module: Its values.
    """

    method: str
    module: PromptMethod


def no_heads(checkpoint: Checkpoint, width: int) -> int | None:
    """Say that a format's prompts do not tell the number of attention heads."""
    return None


@dataclass(frozen=True, kw_only=True)
class ReferenceFormat:
    """One format.

    Attributes:
        title: The method as its paper writes it.
        marks: Parts of keys that tell it from the formats after it in the registry.
        read: Takes the prompts' tensors, for a backbone of the given sizes; raises ``SpecError`` that names the key.
        heads: Attention heads H for prompts of the given width, where the prompts' shapes tell them.
    """

    title: str
    marks: tuple[str, ...]
    read: Callable[[Checkpoint, PromptDimensions], ImportedPrompts]
    heads: Callable[[Checkpoint, int], int | None] = no_heads
