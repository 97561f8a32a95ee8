"""The deployed graph of all tasks, which takes their prompts and heads from a table."""

from __future__ import annotations

import torch
from torch import Tensor

from vpdeploy.format.layout import Layout
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy_export.graph.backbone import BackboneGraph
from vpdeploy_export.graph.columns import NO_COLUMNS, Columns, GeneratorColumns
from vpdeploy_export.precision.islands import NO_ISLANDS, Islands, cast
from vpdeploy_train.trunks import Trunk


class SwitchableGraph(BackboneGraph):
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
