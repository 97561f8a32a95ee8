"""What each choice in the deployed graph is worth: the graph as it is written against the same with one choice undone.

    python -m benchmarks.graph_options --backbone vit_small_patch16_224 --prompts 50 --threads 2

Ratios above 1 are what the choice saves. Weights are random; time does not depend on them.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, nn

from benchmarks.models import preprocessing_of, prompted_model, random_vit
from benchmarks.tokens import TokenPromptedViT, build_token_prompted
from benchmarks.turns import measure_in_turns
from vpdeploy.backends.ort import CPU_PROVIDER, OrtBackend
from vpdeploy.machine import cpu_name
from vpdeploy_export.compilation import compile_prompts
from vpdeploy_export.graph import FoldedGraph
from vpdeploy_export.graph.block import RowGraphBlock
from vpdeploy_export.graph.columns import NO_COLUMNS
from vpdeploy_export.onnx.save import save_model
from vpdeploy_export.onnx.trace import build_folded
from vpdeploy_train.prompted import PromptedViT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="vit_small_patch16_224")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    options = parser.parse_args()
    torch.manual_seed(0)
    vit = random_vit(options.backbone)
    model = prompted_model(vit, options.prompts)
    print(
        f"{options.backbone}, {options.prompts} prompts, {options.threads} threads, {options.rounds} rounds; "
        f"{cpu_name()}, Python {platform.python_version()}, onnxruntime {onnxruntime.__version__}\n"
    )
    with TemporaryDirectory() as folder:
        backends = open_all(Path(folder), model, options.threads)
        results = []
        for batch in options.batch_sizes:
            pixels = np.random.default_rng(0).integers(
                0, 256, (batch, *(2 * [preprocessing_of(vit).image_size]), 3), dtype=np.uint8
            )
            normalised = np.random.default_rng(0).standard_normal((batch, 3, *pixels.shape[1:3]), dtype=np.float32)
            runs = {
                name: (
                    lambda backend=backend, images=normalised if name == PLAIN else pixels: backend.run(images, None)
                )
                for name, backend in backends.items()
            }
            results.append(measure_in_turns(runs, options.rounds, batch=batch))
    print("| graph | " + " | ".join(f"time, batch {batch}" for batch in options.batch_sizes) + " |")
    print("|---" * (1 + len(results)) + "|")
    for name in backends:
        if name != AS_WRITTEN:
            cells = [result.ratio(name, AS_WRITTEN) for result in results]
            print(f"| {name} | {' | '.join(cells)} |")


AS_WRITTEN = "as written"
PLAIN = "the plain timm export"


def open_all(folder: Path, model: PromptedViT, threads: int) -> dict[str, OrtBackend]:
    preprocessing = preprocessing_of(model.vit)

    def folded(change: Callable[[FoldedGraph], object] = lambda graph: None, opset: int = 20) -> ir.Model:
        graph = FoldedGraph(
            model.trunk,
            preprocessing,
            compile_prompts(model),
            model.head,
            dtype=torch.float32,
            image_input="uint8",
            opset=opset,
        )
        change(graph)
        return build_folded(graph, preprocessing, opset=opset)

    graphs = {
        AS_WRITTEN: folded(),
        "the last block computes every row": folded(compute_every_row),
        "the class token reads keys and values": folded(project_every_key),
        "the scale 1/√d multiplies the queries": folded(multiply_queries),
        "the first block's prompts are tokens": folded(lambda graph: insert_first_prompts(graph, model)),
        "tokens as rows of one matrix, linear layers one Gemm": folded(join_rows),
        "queries, keys and values from one product": folded(join_projections),
        "opset 23, one Attention a block": folded(opset=23),
        "ONNX Runtime's MultiHeadAttention": fuse_attention(folded()),
        PLAIN: build_token_prompted(TokenPromptedViT(model.vit, None, model.head), preprocessing.image_size, opset=20),
    }
    backends = {}
    for index, (name, graph) in enumerate(graphs.items()):
        path = folder / f"{index}.onnx"
        save_model(graph, path)
        backends[name] = OrtBackend(path, provider=CPU_PROVIDER, threads=threads, reason="benchmark")
    agree(backends, preprocessing.image_size)
    return backends


def agree(backends: dict[str, OrtBackend], size: int) -> None:
    """Every variant but the plain model is the same function."""
    pixels = np.random.default_rng(1).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    expected = backends[AS_WRITTEN].run(pixels, None)
    for name, backend in backends.items():
        if name != PLAIN:
            np.testing.assert_allclose(backend.run(pixels, None), expected, rtol=1e-3, atol=1e-3, err_msg=name)


def blocks_of(graph: FoldedGraph) -> list[RowGraphBlock]:
    return list(graph.blocks)  # type: ignore[arg-type]


def compute_every_row(graph: FoldedGraph) -> None:
    blocks_of(graph)[-1].first_row_only = False
    project_every_key(graph)


def project_every_key(graph: FoldedGraph) -> None:
    blocks_of(graph)[-1].class_token = None


def multiply_queries(graph: FoldedGraph) -> None:
    for block in blocks_of(graph)[:-1]:
        block.scale = block.head_width**-0.5
        block.query.weight.data /= block.scale
        block.query.bias.data /= block.scale


class PromptsAsTokens(nn.Module):
    """A block that reads its prompts as tokens and discards their outputs."""

    def __init__(self, block: RowGraphBlock, prompts: Tensor) -> None:
        super().__init__()
        self.block = block
        self.register_buffer("prompts", prompts.detach()[None])

    def forward(self, tokens: Tensor, columns: object) -> Tensor:
        rows = torch.cat([tokens, self.prompts.expand(tokens.shape[0], -1, -1)], dim=1)
        return self.block(rows, NO_COLUMNS)[:, : tokens.shape[1]]


def insert_first_prompts(graph: FoldedGraph, model: PromptedViT) -> None:
    graph.blocks[0] = PromptsAsTokens(blocks_of(graph)[0], model.method.visual[0])


class OneMatrix(nn.Module):
    """A layer that sees the rows of all images as one matrix."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, rows: Tensor) -> Tensor:
        return self.layer(rows.flatten(0, 1)).unflatten(0, (-1, rows.shape[1]))


def join_rows(graph: FoldedGraph) -> None:
    for block in blocks_of(graph):
        for name in ("query", "key", "value", "projection", "mlp"):
            setattr(block, name, OneMatrix(getattr(block, name)))


class Joined(nn.Module):
    """Three linear layers as one; the parts are asked for in turn."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__()
        self.layer = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers))
        self.layer.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
        self.layer.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)


class JoinedPart(nn.Module):
    """One part of a joined product; the exporter merges the equal products of the three parts."""

    def __init__(self, joined: Joined, index: int) -> None:
        super().__init__()
        self.joined, self.index = joined, index

    def forward(self, rows: Tensor) -> Tensor:
        return self.joined.layer(rows).chunk(3, dim=-1)[self.index]


def join_projections(graph: FoldedGraph) -> None:
    for block in blocks_of(graph)[:-1]:  # the last block has another number of queries
        joined = Joined([block.query, block.key, block.value])
        block.query, block.key, block.value = (JoinedPart(joined, index) for index in range(3))


def fuse_attention(model: ir.Model) -> ir.Model:
    """Replace each softmax attention over all rows by ONNX Runtime's own operator."""
    graph = model.graph
    for softmax in [node for node in graph if node.op_type == "Softmax" and "class_token" not in node.name]:
        logits = softmax.inputs[0].producer()
        (mixed,) = [use.node for use in softmax.outputs[0].uses()]
        (back,) = [use.node for use in mixed.outputs[0].uses()]
        (rows,) = [use.node for use in back.outputs[0].uses()]
        query = logits.inputs[0].producer().inputs[0]  # [B, M, H, d], before the heads come first
        key, value = logits.inputs[1].producer().inputs[0], mixed.inputs[1]
        heads, width = (int(size) for size in query.shape[2:])
        count = int(query.shape[1])
        shape = ir.Value(
            name=f"{softmax.name}.query_shape",
            const_value=ir.tensor(np.array([-1, count, heads * width])),
            shape=ir.Shape([3]),
            type=ir.TensorType(ir.DataType.INT64),
        )
        graph.initializers[shape.name] = shape
        flat = ir.node("Reshape", [query, shape], name=f"{softmax.name}.query")
        fused = ir.node(
            "MultiHeadAttention",
            [flat.outputs[0], key, value],
            {"num_heads": heads, "scale": 1.0},
            domain="com.microsoft",
            name=f"{softmax.name}.attention",
        )
        graph.insert_before(rows, [flat, fused])
        rows.replace_input_with(0, fused.outputs[0])
        graph.remove([back, mixed, softmax, logits], safe=True)
    graph.opset_imports["com.microsoft"] = 1
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    return RemoveUnusedNodesPass()(model).model


if __name__ == "__main__":
    main()
