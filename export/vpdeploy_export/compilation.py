"""Compiling a model: from prompts to the keys, values and generators that a graph takes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vpdeploy.errors import ExportError
from vpdeploy_train.methods.method import Generator
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.trunks import Prefix, Trunk, trunk_of

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class CompiledGenerator:
    """One block's adaptive prompts, float64; the formula stands at ``vpdeploy_train.methods.method.Generator``.

    Attributes:
        mix: [T, n].
        scale: [D].
        shift: [T, D].
        down: [r, D].
        up: [D, r].
        eps: Of the LayerNorm that is read.
    """

    mix: Array
    scale: Array
    shift: Array
    down: Array
    up: Array
    eps: float

    def own_eps(self, trunk: Trunk, index: int) -> float | None:
        """Return ``eps``, or None where block ``index``'s own LayerNorm has the same and can be shared."""
        norm = trunk.norm(index)
        return None if isinstance(norm, nn.LayerNorm) and norm.eps == self.eps else self.eps


@dataclass(frozen=True, kw_only=True)
class CompiledBlock:
    """One block's share of a compiled prompt set, float64.

    Attributes:
        key: [H, P, d].
        value: [H, P, d].
        bias: Added to the attention logits, [P].
        generator: Where the block has adaptive prompts.
    """

    key: Array
    value: Array
    bias: Array
    generator: CompiledGenerator | None = None


@dataclass(frozen=True, kw_only=True)
class CompiledPrompts:
    """A model's prompts, compiled.

    Attributes:
        blocks: One for each of the L blocks; lengths P may differ and may be 0.
        inserted: Tokens that live on through all blocks (VPT-shallow), [T, D], or None.
        pooled: The last block's prompts where the feature averages over them, [T, D], or None.
        pools_inserted: Whether the feature averages over the inserted tokens, too.
    """

    blocks: tuple[CompiledBlock, ...]
    inserted: Array | None = None
    pooled: Array | None = None
    pools_inserted: bool = False

    @property
    def lengths(self) -> list[int]:
        """Prefix length P of each block."""
        return [block.key.shape[1] for block in self.blocks]

    @property
    def adapts(self) -> bool:
        """Whether any block has adaptive prompts."""
        return any(block.generator is not None for block in self.blocks)

    def merged(self) -> CompiledPrompts:
        """Return a copy in which equal columns of a block are one; see ``merge_equal_columns``."""
        return replace(self, blocks=tuple(merge_equal_columns(block) for block in self.blocks))


def compile_prompts(model: PromptedViT) -> CompiledPrompts:
    """Run each block's frozen norm and projections over its prompts, in float64.

    Args:
        model: A trained model. It is left as it was.

    Raises:
        ExportError: A value is not finite, or the pooling cannot be deployed with these prompts.
    """
    if model.pools_prompts and model.method.form == "adaptive":
        raise ExportError(
            "--pooling published averages over adaptive prompts, for which no graph is written; "
            "train with --pooling patches"
        )
    dtype = next(model.head.parameters()).dtype
    trunk = model.trunk
    last = len(trunk.blocks) - 1
    unused = torch.zeros(1, 1, trunk.feature_width, dtype=torch.float64)
    model.eval().double()
    try:
        with torch.no_grad():
            pooled = model.method.prompts(last, trunk, unused) if model.pools_prompts else None
            inserted = model.method.inserted()
            blocks = []
            for index, stage in enumerate(trunk.block_stages):
                generator = model.method.generator(index, trunk)
                projects = generator is None and not (index == last and model.pools_prompts)
                prefix = model.prefix(index, unused, projects=projects)
                block = _compile_prefix(index, prefix, stage.heads, stage.head_width)
                blocks.append(replace(block, generator=_compile_generator(index, generator)))
    finally:
        model.to(dtype)
    return CompiledPrompts(
        blocks=tuple(blocks),
        inserted=None if inserted is None or not len(inserted) else inserted.detach().double().numpy().copy(),
        pooled=None if pooled is None else pooled.detach().double().numpy().copy(),
        pools_inserted=model.pools_prompts,
    )


def deployed_trunk(model: PromptedViT) -> Trunk:
    """Return the backbone that is deployed: the model's, updates of its weights merged into a copy."""
    if not any(parametrize.is_parametrized(module) for module in model.vit.modules()):
        return model.trunk
    merged = copy.deepcopy(model.vit)
    for parent in list(merged.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and parametrize.is_parametrized(child):
                setattr(parent, name, _merged_linear(child))
    return trunk_of(merged)


def _merged_linear(linear: nn.Linear) -> nn.Linear:
    """Return a plain linear layer of a parametrized one's present weights.

    A copy shares its dynamic class with the original, so removing the parametrization from it would break the original.
    """
    plain = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    with torch.no_grad():
        plain.weight.copy_(linear.weight)
        if linear.bias is not None:
            plain.bias.copy_(linear.bias)
    return plain.requires_grad_(False)


def merge_equal_columns(block: CompiledBlock) -> CompiledBlock:
    """Merge columns of a prefix that have the same key and value in every head into one.

    m equal columns with biases b_i weigh as much as one with bias log Σ exp(b_i), so the result is exact. Pruned tokens
    that a checkpoint keeps as zeros are such columns: LN(0) = β for all of them.
    """
    columns: dict[bytes, list[int]] = {}
    for position in range(block.key.shape[1]):
        identity = block.key[:, position].tobytes() + block.value[:, position].tobytes()
        columns.setdefault(identity, []).append(position)
    firsts = [positions[0] for positions in columns.values()]
    bias = [_log_sum_exp([block.bias[position] for position in positions]) for positions in columns.values()]
    return replace(block, key=block.key[:, firsts], value=block.value[:, firsts], bias=np.array(bias, dtype=np.float64))


def _compile_prefix(index: int, prefix: Prefix | None, heads: int, head_width: int) -> CompiledBlock:
    if prefix is None:
        empty = np.zeros((heads, 0, head_width))
        return CompiledBlock(key=empty, value=empty, bias=np.zeros(0))
    if prefix.key.dim() != 3:
        raise ExportError(f"block {index}: prompts that depend on the image cannot be compiled into a prefix")
    bias = torch.zeros(prefix.key.shape[1]) if prefix.bias is None else prefix.bias
    block = CompiledBlock(
        key=prefix.key.double().numpy(), value=prefix.value.double().numpy(), bias=bias.double().numpy()
    )
    _require_finite(index, "the prompts give keys or values", (block.key, block.value))
    return block


def _compile_generator(index: int, generator: Generator | None) -> CompiledGenerator | None:
    if generator is None:
        return None
    arrays = {
        each.name: value.double().numpy().copy()
        for each in fields(generator)
        if isinstance(value := getattr(generator, each.name), Tensor)
    }
    _require_finite(index, "the generator has weights", arrays.values())
    return CompiledGenerator(**arrays, eps=generator.eps)


def _require_finite(index: int, what: str, arrays: Iterable[Array]) -> None:
    if not all(np.isfinite(array).all() for array in arrays):
        raise ExportError(f"block {index}: {what} that are not finite; train again")


def _log_sum_exp(values: Sequence[float]) -> float:
    largest = max(values)
    return float(largest + math.log(sum(math.exp(value - largest) for value in values)))
