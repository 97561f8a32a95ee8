"""The two deployed graphs: one task's, with its prompts folded in, and that of all tasks, with a table's prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from vpdeploy.graphfacts import ImageInput
from vpdeploy.layout import Layout
from vpdeploy.preprocessing import Preprocessing
from vpdeploy_export.compilation import CompiledBlock, CompiledPrompts
from vpdeploy_export.graph.backbone import graph_parts
from vpdeploy_export.graph.casting import cast
from vpdeploy_export.graph.columns import NO_COLUMNS, Columns, GeneratorColumns
from vpdeploy_export.precision.islands import NO_ISLANDS, Islands
from vpdeploy_train.trunks import Trunk

FUSED_ATTENTION_OPSET = 23
"""From this opset on, attention is written as one ``Attention`` node."""


class _Graph(nn.Module):
    """What both graphs share: the backbone up to the pooled feature. Softmax, head and logits are float32.

    Args:
        trunk: The frozen backbone; its parts are copied.
        preprocessing: Image size, mean and standard deviation.
        dtype: The type of weights and matrix products.
        image_input: The form of the ``image`` input.
        opset: The ONNX opset that will be written; from ``FUSED_ATTENTION_OPSET`` on, attention is one operator.
        islands: The parts that stay float32 in a narrower graph.
    """

    def __init__(
        self,
        trunk: Trunk,
        preprocessing: Preprocessing,
        *,
        dtype: torch.dtype,
        image_input: ImageInput,
        opset: int,
        islands: Islands = NO_ISLANDS,
    ) -> None:
        super().__init__()
        self.image_input = image_input
        parts = graph_parts(trunk, preprocessing, image_input=image_input, fused=opset >= FUSED_ATTENTION_OPSET)
        self.embedding = parts.embedding
        self.blocks = nn.ModuleList(parts.blocks)
        blocks: list[Any] = parts.blocks  # every family's have the method
        for index, block in enumerate(blocks):
            block.set_precision(dtype, islands.of(index))
        self.final = parts.final
        self.dtype = dtype
        self.islands = islands
        self.final_type = torch.float32 if islands.final else dtype
        self.embedding.to(torch.float32 if islands.embedding else dtype)
        self.final.to(self.final_type)
        self.requires_grad_(False).eval()

    def _pool(self, tokens: Tensor) -> Tensor:
        """Return the pooled feature, float32 [B, D]."""
        return cast(self.final(cast(tokens, self.final_type)), torch.float32)

    def _classify(self, feature: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return logits, float32 [B, C].

        Args:
            feature: The pooled feature, float32 [B, D].
            weight: The head's weight, float32 [D, C] or [B, D, C].
            bias: The head's bias, float32 [C] or [B, C].
        """
        if self.dtype == torch.float32:
            return (feature @ weight if weight.dim() == 2 else (feature[:, None, :] @ weight)[:, 0]) + bias
        # TensorRT has no float32 matrix product for Turing; a product and a sum it compiles for every GPU.
        return (feature[:, :, None] * weight).sum(1) + bias


class FoldedGraph(_Graph):
    """The graph of one task: prompts and head are constants, and every block has the prefix length it needs.

    Args:
        trunk: The frozen backbone, or the method's own copy with its weights merged.
        preprocessing: Image size, mean and standard deviation.
        prompts: The compiled prompts.
        head: The trained head.
        dtype: The type of weights and matrix products.
        image_input: The form of the ``image`` input.
        opset: The ONNX opset that will be written.
        islands: The parts that stay float32 in a narrower graph.
    """

    inserted: Tensor | None
    pooled: Tensor | None
    head_weight: Tensor
    head_bias: Tensor

    def __init__(
        self,
        trunk: Trunk,
        preprocessing: Preprocessing,
        prompts: CompiledPrompts,
        head: nn.Linear,
        *,
        dtype: torch.dtype,
        image_input: ImageInput,
        opset: int,
        islands: Islands = NO_ISLANDS,
    ) -> None:
        super().__init__(trunk, preprocessing, dtype=dtype, image_input=image_input, opset=opset, islands=islands)
        for index, block in enumerate(prompts.blocks):
            self._fold(index, block)
        self.generator_eps = [_own_eps(block, trunk, index) for index, block in enumerate(prompts.blocks)]
        rows_type = torch.float32 if any("residual" in islands.of(index) for index in islands.blocks) else dtype
        self._constant("inserted", None if prompts.inserted is None else prompts.inserted[None], rows_type)
        self._constant("pooled", None if prompts.pooled is None else prompts.pooled[None], rows_type)
        self.pools_inserted = prompts.pools_inserted
        self.register_buffer("head_weight", head.weight.detach().float().T.contiguous())
        self.register_buffer("head_bias", head.bias.detach().float())

    def forward(self, image: Tensor) -> Tensor:
        """Return logits, float32 [B, C]."""
        tokens = self.embedding(image)
        own_rows = tokens.shape[1]
        tokens = self._append(tokens, self.inserted)
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            if index == last:
                tokens = self._append(tokens, self.pooled)
            tokens = block(tokens, self._columns(index))
        if self.inserted is not None and not self.pools_inserted:
            tokens = tokens[:, :own_rows]
        return self._classify(self._pool(tokens), self.head_weight, self.head_bias)

    def _fold(self, index: int, block: CompiledBlock) -> None:
        """Register a block's constants, None where there are none."""
        live = block.key.shape[1] > 0
        dtype = torch.float32 if "attention" in self.islands.of(index) else self.dtype
        self._constant(f"prefix_key_{index}", block.key[None] if live else None, dtype)
        self._constant(f"prefix_value_{index}", block.value[None] if live else None, dtype)
        self._constant(f"prefix_bias_{index}", block.bias[None] if live and block.bias.any() else None, torch.float32)
        made = block.generator
        for name in ("mix", "shift", "down", "up"):
            self._constant(f"generator_{name}_{index}", None if made is None else getattr(made, name)[None], dtype)
        self._constant(f"generator_scale_{index}", None if made is None else made.scale[None, None], dtype)

    def _columns(self, index: int) -> Columns:
        generator = None
        if getattr(self, f"generator_mix_{index}") is not None:
            generator = GeneratorColumns(
                mix=getattr(self, f"generator_mix_{index}"),
                scale=getattr(self, f"generator_scale_{index}"),
                shift=getattr(self, f"generator_shift_{index}"),
                down=getattr(self, f"generator_down_{index}"),
                up=getattr(self, f"generator_up_{index}"),
                bias=None,
                eps=self.generator_eps[index],
            )
        return Columns(
            key=getattr(self, f"prefix_key_{index}"),
            value=getattr(self, f"prefix_value_{index}"),
            bias=getattr(self, f"prefix_bias_{index}"),
            generator=generator,
        )

    def _constant(self, name: str, value: npt.NDArray[np.float64] | None, dtype: torch.dtype) -> None:
        if value is None:
            # Of a buffer that is None torch.export's fast path makes an IndexError, and its slow path takes over.
            setattr(self, name, None)
        else:
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(value)).to(dtype))

    @staticmethod
    def _append(tokens: Tensor, rows: Tensor | None) -> Tensor:
        if rows is None:
            return tokens
        return torch.cat([tokens, cast(rows, tokens.dtype).expand(tokens.shape[0], -1, -1)], dim=1)


class SwitchableGraph(_Graph):
    """The graph of all tasks: each row of a batch takes its prompts and head from its slot of the table.

    Args:
        trunk: The frozen backbone.
        preprocessing: Image size, mean and standard deviation.
        layout: The layout of the table.
        dtype: The type of weights and matrix products.
        opset: The ONNX opset that will be written.
        islands: The parts that stay float32 in a narrower graph.
    """

    def __init__(
        self,
        trunk: Trunk,
        preprocessing: Preprocessing,
        layout: Layout,
        *,
        dtype: torch.dtype,
        opset: int,
        islands: Islands = NO_ISLANDS,
    ) -> None:
        super().__init__(trunk, preprocessing, dtype=dtype, image_input="uint8", opset=opset, islands=islands)
        self.layout = layout
        self.stage_depths = [stage.depth for stage in trunk.stages]

    def forward(self, image: Tensor, slot: Tensor, *table: Tensor) -> Tensor:
        """Compute logits.

        Args:
            image: The pixels, uint8 [B, H, W, 3].
            slot: The slot of each row's task, int32 [B].
            table: The layout's tensors in their order, each [S, ...].

        Returns:
            Logits, float32 [B, C].
        """
        rows = {
            spec.name: tensor.index_select(0, slot) for spec, tensor in zip(self.layout.tensors, table, strict=True)
        }
        # NumPy has no bfloat16: such a graph's table is float32, and only a batch's rows of it are narrowed. Where some
        # block attends in float32, every block takes the rows in its own type.
        if not self.islands.widen_prompts:
            rows = {name: value if _stays_float32(name) else cast(value, self.dtype) for name, value in rows.items()}
        tokens = self.embedding(image)
        for block, columns in zip(self.blocks, self._columns(rows), strict=True):
            tokens = block(tokens, columns)
        return self._classify(self._pool(tokens), rows["head_weight"], rows["head_bias"])

    def _columns(self, rows: dict[str, Tensor]) -> list[Columns]:
        """Return each block's share of a batch's rows of the table."""
        columns = []
        for stage, depth in enumerate(self.stage_depths):
            mark = f"_{stage}" if len(self.stage_depths) > 1 else ""
            key, value, bias = (rows[f"prefix_{name}{mark}"] for name in ("key", "value", "bias"))
            stored = key.shape[1]  # an adaptive layout stores a prefix for the first block only
            columns += [
                Columns(key=key[:, index], value=value[:, index], bias=bias[:, index]) if index < stored else NO_COLUMNS
                for index in range(depth)
            ]
        if self.layout.generator is None:
            return columns
        generators = [
            GeneratorColumns(
                mix=rows["generator_mix"][:, index],
                scale=rows["generator_scale"][:, index, None],
                shift=rows["generator_shift"][:, index],
                down=rows["generator_down"],
                up=rows["generator_up"],
                bias=rows["generator_bias"][:, index],
                eps=self.layout.generator.eps,
            )
            for index in range(len(columns) - 1)
        ]
        first, *others = columns
        joined = zip(others, generators, strict=True)
        return [first, *(Columns(key=c.key, value=c.value, bias=c.bias, generator=g) for c, g in joined)]


def _stays_float32(name: str) -> bool:
    """Tell whether a tensor of a layout is float32 in every graph: biases of logits, and heads."""
    return name.startswith("head_") or "_bias" in name


def _own_eps(block: CompiledBlock, trunk: Trunk, index: int) -> float | None:
    """Return the eps of a generator's LayerNorm where it differs from the block's own."""
    return None if block.generator is None else block.generator.own_eps(trunk, index)
