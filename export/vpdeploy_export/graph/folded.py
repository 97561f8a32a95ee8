"""The deployed graph of one task, with its prompts and head folded in."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from vpdeploy.format.graphfacts import ImageInput
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy_export.compilation import CompiledBlock, CompiledPrompts
from vpdeploy_export.graph.backbone import BackboneGraph
from vpdeploy_export.graph.columns import Columns, GeneratorColumns
from vpdeploy_export.precision.islands import NO_ISLANDS, Islands, cast
from vpdeploy_train.trunks import Trunk


class FoldedGraph(BackboneGraph):
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


def _own_eps(block: CompiledBlock, trunk: Trunk, index: int) -> float | None:
    """Return the eps of a generator's LayerNorm where it differs from the block's own."""
    return None if block.generator is None else block.generator.own_eps(trunk, index)
