"""Compiling a model: its prompts become the keys, values and generators that a graph takes."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vpdeploy.errors import ExportError
from vpdeploy_train.methods.method import Generator
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.trunks import Trunk, trunk_of

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class CompiledGenerator:
    """What makes one block's adaptive prompts, float64; ``vpdeploy_train.methods.method.Generator`` has the formula.

    Attributes:
        mix: Weights that mix the n patches into T prompts, [T, n].
        scale: What each channel of the mixed patches is multiplied by, [D].
        shift: What is added to them then, [T, D].
        down: First layer of the feature projector, [r, D].
        up: Its second layer, [D, r].
        eps: The eps of the LayerNorm that the generator reads.
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
    """One block's share of a compiled prompt set, float64. A column stands for all prompts that are equal.

    Attributes:
        key: The columns' keys, [H, P, d].
        value: The columns' values, [H, P, d].
        bias: What is added to the columns' logits, [P]: log m where a column stands for m equal prompts.
        generator: What makes adaptive prompts of the image; None where the block has none.
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
        """The prefix length P of each block."""
        return [block.key.shape[1] for block in self.blocks]

    @property
    def adapts(self) -> bool:
        """Whether any block has adaptive prompts."""
        return any(block.generator is not None for block in self.blocks)


def compile_prompts(model: PromptedViT) -> CompiledPrompts:
    """Run each block's frozen norm and projections over its prompts, in float64.

    Equal prompts of a block become one column: m keys and values that are the same weigh in the softmax as much as one
    whose logit is log m higher, so this is exact. Tokens that a checkpoint keeps as zeros are such prompts. They are
    compared before anything is multiplied, because the rows of a matrix product are not all computed alike: on some
    processors equal rows in give rows out that differ in the last bits.

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

    # Everything is compiled in float64, and the model brought back to its type whatever happens.
    dtype = next(model.head.parameters()).dtype
    trunk = model.trunk
    last = len(trunk.blocks) - 1
    unused = torch.zeros(1, 1, trunk.feature_width, dtype=torch.float64)
    model.eval().double()
    try:
        with torch.no_grad():
            # Prompts that stay tokens: those that are pooled, and those that live on through the blocks.
            pooled = model.method.prompts(last, trunk, unused) if model.pools_prompts else None
            inserted = model.method.inserted()

            # All others become columns or a generator of their block.
            blocks = []
            for index in range(len(trunk.blocks)):
                generator = model.method.generator(index, trunk)
                projects = generator is None and not (index == last and model.pools_prompts)
                prompts = model.method.prompts(index, trunk, unused) if projects else None
                block = _compile_prefix(index, trunk, model.method.key_values(index), prompts)
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
    """Return the backbone that is deployed: the model's own, or a copy with the updates of its weights merged."""
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


def _compile_prefix(
    index: int, trunk: Trunk, key_values: tuple[Tensor, Tensor] | None, prompts: Tensor | None
) -> CompiledBlock:
    """Return the columns of block ``index``: its distinct key/value prompts, then its distinct visual ones, projected.

    Args:
        index: The block, 0 to L - 1.
        trunk: The backbone, float64.
        key_values: The key prompts and the value prompts, each float64 [H, T_KV, d], or None.
        prompts: The visual prompts, float64 [T, D], or None.
    """
    if (key_values is not None and key_values[0].dim() != 3) or (prompts is not None and prompts.dim() != 2):
        raise ExportError(f"block {index}: prompts that depend on the image cannot be compiled into a prefix")
    stage = trunk.block_stages[index]
    empty = torch.zeros(stage.heads, 0, stage.head_width, dtype=torch.float64)
    keys, values, biases = [empty], [empty], [np.zeros(0)]

    # A column has one key and one value in every head, and equals another where all of them do.
    if key_values is not None:
        firsts, bias = _distinct(torch.cat(key_values, dim=2).transpose(0, 1).flatten(1))
        keys.append(key_values[0][:, firsts])
        values.append(key_values[1][:, firsts])
        biases.append(bias)

    # Only distinct prompts are projected: what is equal after a product may differ by rounding.
    if prompts is not None:
        firsts, bias = _distinct(prompts)
        key, value = trunk.project(index, prompts[firsts])
        keys.append(key)
        values.append(value)
        biases.append(bias)

    block = CompiledBlock(
        key=torch.cat(keys, dim=1).numpy(), value=torch.cat(values, dim=1).numpy(), bias=np.concatenate(biases)
    )
    _require_finite(index, "the prompts give keys or values", (block.key, block.value))
    return block


def _distinct(rows: Tensor) -> tuple[list[int], Array]:
    """Find the distinct rows of [T, n], compared exactly; -0.0 equals 0.0.

    Returns:
        The index at which each distinct row stands first, ascending, and the logarithm of how often it occurs,
        float64 [P].
    """
    # Adding 0.0 turns -0.0 into 0.0 and changes nothing else.
    identities = [row.tobytes() for row in rows.detach().numpy() + 0.0]
    counts = Counter(identities)
    return [identities.index(identity) for identity in counts], np.log(
        np.array(list(counts.values()), dtype=np.float64)
    )


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
