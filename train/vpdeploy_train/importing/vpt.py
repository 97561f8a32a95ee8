"""VPT's prompts: shallow where there is one tensor, deep where there is one for each block."""

from __future__ import annotations

from typing import Final

from torch import Tensor

from vpdeploy_train.importing.checkpoint import Checkpoint
from vpdeploy_train.importing.reference import ImportedPrompts, ReferenceFormat
from vpdeploy_train.importing.visual import DEEP, project, read_all, read_first
from vpdeploy_train.methods.e2vpt import E2VPT
from vpdeploy_train.methods.kept import Kept
from vpdeploy_train.methods.method import PromptDimensions
from vpdeploy_train.methods.shallow import VPTShallow


def read_vpt(checkpoint: Checkpoint, dimensions: PromptDimensions) -> ImportedPrompts:
    """Take VPT's prompts; without prompts of deeper blocks they are VPT-shallow's.

    Raises:
        SpecError: A tensor is missing or of another shape.
    """
    width = dimensions.blocks[0].width
    if DEEP not in checkpoint:
        visual = project(checkpoint, read_first(checkpoint, width), width)
        shallow = VPTShallow(dimensions, len(visual))
        shallow.load_state_dict({"visual": visual}, strict=True)
        return ImportedPrompts(method="vpt-shallow", module=shallow)
    prompts = project(checkpoint, read_all(checkpoint, dimensions.depth, width), width)
    return ImportedPrompts(method="vpt-deep", module=deep_prompts(dimensions, prompts))


def deep_prompts(dimensions: PromptDimensions, visual: Tensor) -> E2VPT:
    """Return VPT-deep of given values, [L, T, D]."""
    method = E2VPT(dimensions, Kept.everything(dimensions.depth, visual.shape[1], 0))
    values = {f"visual.{index}": block for index, block in enumerate(visual)}
    method.load_state_dict({**method.state_dict(), **values}, strict=True)
    return method


FORMAT: Final = ReferenceFormat(title="VPT", marks=("prompt_embeddings",), read=read_vpt)
