"""Prompt methods by name. A method is one file and one line in ``METHODS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from vpdeploy.errors import BundleCorruptError, SpecError
from vpdeploy_train.methods.e2vpt import E2VPT, SEGMENTS, Kept, PromptDimensions, SegmentOrder
from vpdeploy_train.methods.method import NoPrompts, PromptMethod

__all__ = ["METHODS", "Method", "MethodOptions", "PromptDimensions", "PromptMethod", "method_named"]


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """What a user can choose about the prompts.

    Attributes:
        prompt_tokens: Visual prompts per block, T.
        kv_tokens: Key/value prompts per block, T_KV.
        kv_shared: Keys and values share one tensor.
        dropout: Element-wise dropout on the visual prompts while training.
        segment_order: How a token's channels form segments.
    """

    prompt_tokens: int = 10
    kv_tokens: int = 5
    kv_shared: bool = True
    dropout: float = 0.1
    segment_order: SegmentOrder = "contiguous"


@dataclass(frozen=True, kw_only=True)
class Method:
    """How to make and to restore one kind of prompts.

    Attributes:
        create: Fresh prompts from sizes, options and a source of randomness.
        restore: Prompts of the stored ``PromptMethod.structure``, their values still to be loaded.
        prunable: Whether pruning and rewinding apply.
    """

    create: Callable[[PromptDimensions, MethodOptions, torch.Generator], PromptMethod]
    restore: Callable[[PromptDimensions, dict[str, Any]], PromptMethod]
    prunable: bool


def _create_e2vpt(dimensions: PromptDimensions, options: MethodOptions, generator: torch.Generator) -> PromptMethod:
    if dimensions.width % SEGMENTS:
        raise SpecError(f"token width {dimensions.width} is not divisible into {SEGMENTS} segments")
    return E2VPT(
        dimensions,
        Kept.everything(dimensions.depth, options.prompt_tokens, options.kv_tokens),
        kv_shared=options.kv_shared,
        dropout=options.dropout,
        segment_order=options.segment_order,
        generator=generator,
    )


def _create_vpt_deep(dimensions: PromptDimensions, options: MethodOptions, generator: torch.Generator) -> PromptMethod:
    return _create_e2vpt(dimensions, replace(options, kv_tokens=0), generator)


def _restore_e2vpt(dimensions: PromptDimensions, structure: dict[str, Any]) -> PromptMethod:
    try:
        kept = Kept.from_fields(structure["kept"])
        if len(kept.tokens) != dimensions.depth or structure["segment_order"] not in ("contiguous", "strided"):
            raise ValueError(f"{len(kept.tokens)} blocks, {dimensions.depth} expected")
        return E2VPT(dimensions, kept, kv_shared=bool(structure["kv_shared"]), segment_order=structure["segment_order"])
    except (KeyError, TypeError, ValueError) as error:
        raise BundleCorruptError(f"the structure of the prompts makes no sense: {error}") from error


METHODS: dict[str, Method] = {
    "e2vpt": Method(create=_create_e2vpt, restore=_restore_e2vpt, prunable=True),
    "vpt-deep": Method(create=_create_vpt_deep, restore=_restore_e2vpt, prunable=True),
    "linear": Method(create=lambda *_: NoPrompts(), restore=lambda *_: NoPrompts(), prunable=False),
}


def method_named(name: str) -> Method:
    """Return a method by name.

    Raises:
        SpecError: There is none of that name.
    """
    if name not in METHODS:
        raise SpecError(f"unknown method '{name}'; choose one of: {', '.join(METHODS)}")
    return METHODS[name]
