"""Packing compiled prompts into the tensors of a layout, and the layout that a set of tasks needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from vpdeploy.errors import ExportError, LayoutMismatchError, SpecError
from vpdeploy.format.graphfacts import Precision
from vpdeploy.format.layout import MASKED, Family, GeneratorSpec, Layout
from vpdeploy.format.promptset import CompiledPromptSet
from vpdeploy.format.task import BackboneId, TaskCard
from vpdeploy_export.compilation import CompiledBlock, CompiledGenerator, CompiledPrompts
from vpdeploy_train.trunks import Trunk

NUMPY_DTYPES: dict[Precision, str] = {"fp32": "float32", "fp16": "float16", "bf16": "float32"}
"""Of a table's tensors. NumPy has no bfloat16: the graph narrows a batch's rows itself."""

Arrays = dict[str, npt.NDArray[np.generic]]


def choose_layout(
    tasks: Mapping[str, CompiledPrompts],
    backbone: BackboneId,
    trunk: Trunk,
    *,
    precision: Precision,
    family: Family | None = None,
) -> Layout:
    """Return the smallest layout that holds all tasks, or the one of the given family.

    Args:
        tasks: Compiled prompts by task.
        backbone: The shared one.
        trunk: The same.
        precision: Of the graph.
        family: What to prepare for; None takes what the tasks need.

    Raises:
        SpecError: A task does not fit the family, or two tasks' generators read through LayerNorms of different eps.
    """
    adaptive = {name: prompts for name, prompts in tasks.items() if prompts.adapts}
    later_prefix = [name for name, prompts in tasks.items() if any(prompts.lengths[1:])]
    needed: Family = "prefix" if not adaptive else ("superset" if later_prefix else "adaptive")
    family = family or needed
    if adaptive and family == "prefix":
        raise SpecError(f"--layout prefix: task '{next(iter(adaptive))}' has adaptive prompts; use superset")
    if later_prefix and family == "adaptive":
        raise SpecError(f"--layout adaptive: task '{later_prefix[0]}' has prompts in every block; use superset")
    if family != "prefix" and trunk.grid is None:
        raise SpecError(f"--layout {family}: {backbone.name} has no patch grid shared by all blocks; use prefix")
    spec = None if family == "prefix" else _generator_spec(adaptive, trunk)
    return Layout.for_backbone(backbone, dtype=NUMPY_DTYPES[precision], family=family, generator=spec)


def pack(prompts: CompiledPrompts, head: nn.Linear, card: TaskCard, layout: Layout, trunk: Trunk) -> CompiledPromptSet:
    """Return a task's tensors in a layout, blocks padded to the longest with ``MASKED``.

    Raises:
        LayoutMismatchError: The layout has no place for the prompts.
        ExportError: A value is not finite, or does not fit the layout's dtype.
    """
    check_switchable(prompts, card)
    tensors: Arrays = {}
    start = 0
    length = max(prompts.lengths)
    for number, stage in enumerate(trunk.stages):
        mark = f"_{number}" if len(trunk.stages) > 1 else ""
        blocks = prompts.blocks[start : start + stage.depth]
        start += stage.depth
        if layout.family == "adaptive":
            if any(prompts.lengths[1:]):
                raise _mismatch(card, "has prompts in every block", layout)
            blocks = blocks[:1]
        tensors |= _pack_prefix(blocks, length, mark)
    if layout.generator is not None:
        tensors |= _pack_generators([block.generator for block in prompts.blocks[1:]], card, layout, trunk)
    elif prompts.adapts:
        raise _mismatch(card, "has adaptive prompts", layout)
    tensors |= {
        "head_weight": head.weight.detach().cpu().numpy().astype(np.float64).T,
        "head_bias": head.bias.detach().cpu().numpy().astype(np.float64),
    }
    if not all(np.isfinite(tensors[name]).all() for name in ("head_weight", "head_bias")):
        raise ExportError(f"task '{card.name}': the head is not finite; train again")
    narrowed = {spec.name: _narrow(tensors[spec.name], spec.dtype, card.name) for spec in layout.tensors}
    for array in narrowed.values():
        array.flags.writeable = False
    return CompiledPromptSet(card=card, layout=layout, tensors=narrowed)


def check_switchable(prompts: CompiledPrompts, card: TaskCard) -> None:
    """Refuse prompts that no table can hold.

    Raises:
        SpecError: They stay tokens; the message says why and what to do.
    """
    if prompts.inserted is not None:
        raise SpecError(
            f"task '{card.name}': VPT-shallow's prompts change from block to block with the image, so they are tokens "
            "of the graph, not a prefix that can be switched; export it alone as FILE.onnx, or train vpt-deep"
        )
    if prompts.pooled is not None:
        raise SpecError(
            f"task '{card.name}': --pooling published averages over the prompts' own outputs, which a shared graph "
            "does not compute; export it alone as FILE.onnx, or train with --pooling patches"
        )


def with_details(prompt_set: CompiledPromptSet, **sections: object) -> CompiledPromptSet:
    """Return a copy whose card has further sections in its details."""
    card = replace(prompt_set.card, details={**prompt_set.card.details, **sections})
    return replace(prompt_set, card=card)


def _generator_spec(adaptive: Mapping[str, CompiledPrompts], trunk: Trunk) -> GeneratorSpec:
    found: dict[float | None, str] = {}
    for name, prompts in adaptive.items():
        for index, block in enumerate(prompts.blocks):
            if block.generator is not None:
                found.setdefault(block.generator.own_eps(trunk, index), name)
    if len(found) > 1:
        (first, one), (second, other), *_ = found.items()
        raise SpecError(
            f"tasks '{one}' and '{other}' generate prompts through LayerNorms of eps {first or 'the block'} and "
            f"{second or 'the block'}; export them into two bundles"
        )
    return GeneratorSpec(patches=(trunk.grid or 0) ** 2, eps=next(iter(found), None))


def _mismatch(card: TaskCard, what: str, layout: Layout) -> LayoutMismatchError:
    return LayoutMismatchError(
        f"task '{card.name}' ({card.method}) {what}, which the graph's {layout.family} layout has no place for; "
        "export all runs of the bundle again with --replace --layout superset"
    )


def _pack_prefix(blocks: Sequence[CompiledBlock], length: int, mark: str) -> Arrays:
    heads, _, head_width = blocks[0].key.shape
    shape = (len(blocks), heads, length, head_width)
    key, value, bias = np.zeros(shape), np.zeros(shape), np.full((len(blocks), length), MASKED)
    for index, block in enumerate(blocks):
        live = block.key.shape[1]
        key[index, :, :live], value[index, :, :live], bias[index, :live] = block.key, block.value, block.bias
    return {f"prefix_key{mark}": key, f"prefix_value{mark}": value, f"prefix_bias{mark}": bias}


def _pack_generators(
    generators: Sequence[CompiledGenerator | None], card: TaskCard, layout: Layout, trunk: Trunk
) -> Arrays:
    spec: Any = layout.generator
    width = trunk.feature_width
    live = [generator for generator in generators if generator is not None]
    length = max((len(generator.mix) for generator in live), default=0)
    hidden = max((len(generator.down) for generator in live), default=0)
    depth = len(generators)
    arrays: Arrays = {
        "generator_mix": np.zeros((depth, length, spec.patches)),
        "generator_scale": np.zeros((depth, width)),
        "generator_shift": np.zeros((depth, length, width)),
        "generator_down": live[0].down if live else np.zeros((hidden, width)),
        "generator_up": live[0].up if live else np.zeros((width, hidden)),
        "generator_bias": np.full((depth, length), MASKED),
    }
    for index, generator in enumerate(generators):
        if generator is None:
            continue
        own_eps, count = generator.own_eps(trunk, index + 1), len(generator.mix)
        if own_eps != spec.eps or generator.mix.shape[1] != spec.patches:
            raise LayoutMismatchError(
                f"task '{card.name}': its generators read {generator.mix.shape[1]} patches with eps {generator.eps}, "
                f"the graph {spec.patches} with eps {spec.eps or 'of the block'}; export it into another bundle"
            )
        arrays["generator_mix"][index, :count] = generator.mix
        arrays["generator_scale"][index] = generator.scale
        arrays["generator_shift"][index, :count] = generator.shift
        arrays["generator_bias"][index, :count] = 0
    return arrays


def _narrow(array: npt.NDArray[np.generic], dtype: str, task: str) -> npt.NDArray[np.generic]:
    """Cast to the graph's type and refuse values that overflow it."""
    with np.errstate(over="ignore"):
        narrowed = np.ascontiguousarray(array.astype(dtype))
    if not np.isfinite(narrowed).all():
        largest = np.abs(array.astype(np.float64)).max()
        raise ExportError(
            f"task '{task}': a value of {largest:.3g} does not fit {dtype}; export with --bf16, or without --fp16"
        )
    return narrowed
