"""Compiling a run: from prompts to the keys, values and head that the graph takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from vpdeploy.errors import ExportError
from vpdeploy.layout import MASKED, Layout
from vpdeploy.manifest import Precision
from vpdeploy.promptset import CompiledPromptSet
from vpdeploy.task import TaskCard
from vpdeploy_train.attention import Prefix
from vpdeploy_train.prompted import PromptedViT

NUMPY_DTYPES: dict[Precision, str] = {"fp32": "float32", "fp16": "float16"}


@dataclass(frozen=True, kw_only=True)
class BlockPrefix:
    """One block's share of a compiled prompt set, float64.

    Attributes:
        key: [H, P, d].
        value: [H, P, d].
        bias: Added to the attention logits, [P].
    """

    key: npt.NDArray[np.float64]
    value: npt.NDArray[np.float64]
    bias: npt.NDArray[np.float64]


def compile_prefix(model: PromptedViT) -> list[BlockPrefix]:
    """Run each block's frozen norm and projections over its prompts, in float64.

    Args:
        model: A trained model whose prompts do not depend on the image. It is left as it was.

    Returns:
        For each of the L blocks its prefix; lengths P may differ and may be 0.

    Raises:
        ExportError: A key or value is not finite.
    """
    dtype = next(model.head.parameters()).dtype
    attention = model.vit.blocks[0].attn
    unused = torch.zeros(1, 1, model.vit.embed_dim, dtype=torch.float64)
    model.eval().double()
    try:
        with torch.no_grad():
            prefixes = [model.method.prefix(index, block, unused) for index, block in enumerate(model.vit.blocks)]
    finally:
        model.to(dtype)
    return [_to_numpy(index, prefix, attention.num_heads, attention.head_dim) for index, prefix in enumerate(prefixes)]


def merge_equal_columns(prefix: BlockPrefix) -> BlockPrefix:
    """Merge columns of a prefix that have the same key and value in every head into one.

    m equal columns with biases b_i weigh as much as one with bias log Σ exp(b_i), so the result is exact. Pruned tokens
    that a checkpoint keeps as zeros are such columns: LN(0) = β for all of them.
    """
    columns: dict[bytes, list[int]] = {}
    for position in range(prefix.key.shape[1]):
        identity = prefix.key[:, position].tobytes() + prefix.value[:, position].tobytes()
        columns.setdefault(identity, []).append(position)
    firsts = [positions[0] for positions in columns.values()]
    bias = [_log_sum_exp([prefix.bias[position] for position in positions]) for positions in columns.values()]
    return BlockPrefix(key=prefix.key[:, firsts], value=prefix.value[:, firsts], bias=np.array(bias, dtype=np.float64))


def compile_prompt_set(model: PromptedViT, card: TaskCard, *, precision: Precision) -> CompiledPromptSet:
    """Compile a trained model's prompts and head into the tensors of the switchable graph.

    Args:
        model: The trained model.
        card: Its task.
        precision: Of the graph.

    Returns:
        Keys and values padded to the longest block; padding has the bias of ``MASKED``.

    Raises:
        ExportError: A value is not finite, or does not fit the precision.
    """
    blocks = [merge_equal_columns(prefix) for prefix in compile_prefix(model)]
    backbone = card.backbone
    dtype = NUMPY_DTYPES[precision]
    length = max(block.key.shape[1] for block in blocks)
    shape = (backbone.depth, backbone.heads, length, backbone.head_width)
    key, value = np.zeros(shape), np.zeros(shape)
    bias = np.full((backbone.depth, length), MASKED)
    for index, block in enumerate(blocks):
        live = block.key.shape[1]
        key[index, :, :live], value[index, :, :live], bias[index, :live] = block.key, block.value, block.bias
    tensors = {
        "prefix_key": _narrow(key, dtype, card.name),
        "prefix_value": _narrow(value, dtype, card.name),
        "prefix_bias": bias.astype(np.float32),
        "head_weight": np.ascontiguousarray(model.head.weight.detach().float().numpy().T),
        "head_bias": model.head.bias.detach().float().numpy().copy(),
    }
    if not all(np.isfinite(tensors[name]).all() for name in ("head_weight", "head_bias")):
        raise ExportError(f"task '{card.name}': the head is not finite; train again")
    for array in tensors.values():
        array.flags.writeable = False
    layout = Layout.for_prefix(
        depth=backbone.depth,
        heads=backbone.heads,
        head_width=backbone.head_width,
        width=backbone.width,
        dtype=dtype,
    )
    return CompiledPromptSet(card=card, layout=layout, tensors=dict(tensors))


def with_details(prompt_set: CompiledPromptSet, **sections: object) -> CompiledPromptSet:
    """Return a copy whose card has further sections in its details."""
    card = replace(prompt_set.card, details={**prompt_set.card.details, **sections})
    return replace(prompt_set, card=card)


def _to_numpy(index: int, prefix: Prefix | None, heads: int, head_width: int) -> BlockPrefix:
    if prefix is None:
        empty = np.zeros((heads, 0, head_width))
        return BlockPrefix(key=empty, value=empty, bias=np.zeros(0))
    if prefix.key.dim() != 3:
        raise ExportError(f"block {index}: prompts that depend on the image cannot be compiled into a prefix")
    bias = torch.zeros(prefix.key.shape[1]) if prefix.bias is None else prefix.bias
    result = BlockPrefix(
        key=prefix.key.double().numpy(), value=prefix.value.double().numpy(), bias=bias.double().numpy()
    )
    if not np.isfinite(result.key).all() or not np.isfinite(result.value).all():
        raise ExportError(f"block {index}: the prompts give keys or values that are not finite; train again")
    return result


def _narrow(array: npt.NDArray[np.float64], dtype: str, task: str) -> npt.NDArray[np.generic]:
    """Cast to the graph's type and refuse values that overflow it."""
    with np.errstate(over="ignore"):
        narrowed = array.astype(dtype)
    if not np.isfinite(narrowed).all():
        raise ExportError(
            f"task '{task}': a key or value of {np.abs(array).max():.3g} does not fit {dtype}; export without --fp16"
        )
    return narrowed


def _log_sum_exp(values: Sequence[float]) -> float:
    largest = max(values)
    return float(largest + math.log(sum(math.exp(value - largest) for value in values)))
