from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime
import pytest
import tiny_runs
from onnx import TensorProto

from vpdeploy.errors import SpecError
from vpdeploy.format.bundle import Bundle
from vpdeploy_export.export import ExportReport
from vpdeploy_export.onnx import trace as tracing

MakePixels = Callable[..., np.ndarray]

DEPTH, TOKENS, HEADS = tiny_runs.DEPTH, tiny_runs.TOKENS, tiny_runs.HEADS
HIDDEN = 2 * tiny_runs.WIDTH
FLOWERS_PREFIX = (5, 1, 3)
"""Prompts that the run ``flowers`` keeps in each block."""

MODELS = ("folded", "bundle", "half folded", "half bundle", "fused folded", "fused bundle")


@pytest.fixture(scope="session")
def models(
    zoo: Path,
    folded_flowers: Path,
    half_folded: ExportReport,
    half_zoo: ExportReport,
    fused_folded: ExportReport,
    fused_zoo: ExportReport,
) -> dict[str, Path]:
    """Files by what they are."""
    return {
        "folded": folded_flowers,
        "bundle": zoo / "model.onnx",
        "half folded": half_folded.path,
        "half bundle": half_zoo.path / "model.onnx",
        "fused folded": fused_folded.path,
        "fused bundle": fused_zoo.path / "model.onnx",
    }


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def path(models: dict[str, Path], kind: str) -> Path:
    return models[kind]


@pytest.fixture
def graph(path: Path) -> onnx.GraphProto:
    """The graph with the shapes of all values."""
    return onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True, data_prop=True).graph


def dims(graph: onnx.GraphProto) -> dict[str, list[int | str]]:
    """Sizes of every value whose shape is known; names stand for dynamic ones."""
    values = [*graph.input, *graph.output, *graph.value_info]
    found = {
        value.name: [
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in value.type.tensor_type.shape.dim
        ]
        for value in values
        if value.type.tensor_type.HasField("shape")
    }
    return found | {tensor.name: list(tensor.dims) for tensor in graph.initializer}


def types(graph: onnx.GraphProto) -> dict[str, int]:
    values = [*graph.input, *graph.output, *graph.value_info]
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {tensor.name: tensor.data_type for tensor in graph.initializer}


def nodes(graph: onnx.GraphProto, *operators: str) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type in operators]


def test_the_full_checker_accepts_the_file(path: Path):
    onnx.checker.check_model(path, full_check=True)


def test_the_opset_is_the_one_asked_for(path: Path, kind: str):
    versions = {opset.domain: opset.version for opset in onnx.load(path).opset_import}
    assert versions[""] == (23 if "fused" in kind else 20)
    assert {node.domain for node in onnx.load(path).graph.node} <= {"", "ai.onnx"}
    assert not onnx.load(path).functions


def test_inputs_and_outputs_are_those_of_the_layout(graph: onnx.GraphProto, kind: str):
    found = {value.name: (types(graph)[value.name], dims(graph)[value.name]) for value in graph.input}
    image = (TensorProto.UINT8, ["batch", 32, 32, 3])
    narrow = TensorProto.FLOAT16 if "half" in kind else TensorProto.FLOAT
    if "folded" in kind:
        assert found == {"image": image}
        classes: int | str = 4
    else:
        head_width = tiny_runs.WIDTH // HEADS
        assert list(found.items()) == [
            ("image", image),
            ("slot", (TensorProto.INT32, ["batch"])),
            ("prefix_key", (narrow, ["slots", DEPTH, HEADS, "prefix", head_width])),
            ("prefix_value", (narrow, ["slots", DEPTH, HEADS, "prefix", head_width])),
            ("prefix_bias", (TensorProto.FLOAT, ["slots", DEPTH, "prefix"])),
            ("head_weight", (TensorProto.FLOAT, ["slots", tiny_runs.WIDTH, "classes"])),
            ("head_bias", (TensorProto.FLOAT, ["slots", "classes"])),
        ]
        classes = "classes"
    (output,) = graph.output
    assert (output.name, types(graph)["logits"]) == ("logits", TensorProto.FLOAT)
    assert dims(graph)["logits"] == ["batch", classes]


def test_norms_activations_and_attention_are_single_operators(graph: onnx.GraphProto, kind: str):
    count = Counter(node.op_type for node in graph.node)
    assert count["LayerNormalization"] == 2 * DEPTH + 1
    assert count["Gelu"] == DEPTH
    assert count["Attention"] == (DEPTH if "fused" in kind else 0)
    assert count["Softmax"] == (0 if "fused" in kind else DEPTH)
    assert not {"ReduceMean", "Pow", "Sqrt", "Erf", "Tanh", "Identity", "Dropout"} & count.keys()


def mentions_prompts(sizes: list[int | str], kind: str) -> bool:
    """Whether a shape has an axis of tokens and prompts together."""
    if "folded" in kind:
        return any(TOKENS + length in sizes for length in FLOWERS_PREFIX)
    return any(isinstance(size, str) and "prefix" in size and size != "prefix" for size in sizes)


ROWS = (["batch"], ["batch", TOKENS], ["batch", TOKENS - 1], ["batch", 1], ["batch", HEADS, 1])


def test_prompts_are_never_rows_of_a_projection_norm_or_mlp(graph: onnx.GraphProto, kind: str):
    sizes = dims(graph)
    weights = {tensor.name for tensor in graph.initializer}
    projections = [node for node in nodes(graph, "MatMul", "Gemm") if weights & set(node.input)]
    layers = projections + nodes(graph, "LayerNormalization", "Gelu")
    assert len(projections) >= 6 * DEPTH
    for node in layers:
        for name in (*node.input[:1], *node.output):
            # Rows are tokens, or patches in the embedding; each head of the last block has one query.
            assert sizes[name][:-1] in ROWS, (node.op_type, name, sizes[name])
    joined = [name for name, shape in sizes.items() if mentions_prompts(shape, kind)]
    concats = [node for node in nodes(graph, "Concat") if node.output[0] in joined]
    assert len(concats) >= 2 * DEPTH - 1  # keys and values of each block, of the last one the logits


def test_the_last_block_computes_the_class_token_only(graph: onnx.GraphProto):
    sizes = dims(graph)
    every_row = ["batch", TOKENS, HIDDEN]
    assert [sizes[node.output[0]] for node in nodes(graph, "Gelu")] == [every_row, every_row, ["batch", 1, HIDDEN]]


@pytest.mark.parametrize("kind", ["folded", "bundle", "half folded", "half bundle"], indirect=False)
def test_the_last_blocks_attention_has_one_query_row(models: dict[str, Path], kind: str):
    graph = onnx.shape_inference.infer_shapes(onnx.load(models[kind]), data_prop=True).graph
    rows = [dims(graph)[node.input[0]][:-1] for node in nodes(graph, "Softmax")]
    assert rows == [["batch", HEADS, TOKENS], ["batch", HEADS, TOKENS], ["batch", HEADS]]


def test_the_last_block_makes_no_keys_and_values_of_the_tokens(models: dict[str, Path]):
    for kind in ("folded", "bundle"):
        projected = [node.name for node in onnx.load(models[kind]).graph.node if node.op_type == "MatMul"]
        for layer in ("key", "value"):
            assert [f"blocks.{index}.{layer}.MatMul" in projected for index in range(DEPTH)] == [True, True, False]


def test_half_precision_narrows_weights_but_not_softmax_head_or_logits(models: dict[str, Path]):
    for kind in ("half folded", "half bundle"):
        graph = onnx.shape_inference.infer_shapes(onnx.load(models[kind]), data_prop=True).graph
        elements = types(graph)
        assert {elements[node.input[0]] for node in nodes(graph, "Softmax")} == {TensorProto.FLOAT}
        assert {elements[node.output[0]] for node in nodes(graph, "Gelu")} == {TensorProto.FLOAT16}
        for node in nodes(graph, "LayerNormalization"):
            stash = {attribute.name: attribute.i for attribute in node.attribute}.get("stash_type", 1)
            assert stash == TensorProto.FLOAT  # the statistics are in float32
        matrices = [tensor for tensor in graph.initializer if len(tensor.dims) == 2]
        wide = [tensor for tensor in matrices if tensor.data_type == TensorProto.FLOAT]
        narrow = [tensor for tensor in matrices if tensor.data_type == TensorProto.FLOAT16]
        assert len(narrow) >= 6 * DEPTH - 2
        by_head = {
            tensor.name: tensor.data_type
            for tensor in graph.initializer
            if tensor.name.startswith(("blocks.2.class_token.key", "blocks.2.class_token.value"))
        }
        assert len(by_head) == 4  # the last block's key and value projection, weight and bias
        assert set(by_head.values()) == {TensorProto.FLOAT16}
        assert [sorted(tensor.dims) for tensor in wide] == ([[4, 48]] if kind == "half folded" else [])


def test_half_precision_halves_the_file(models: dict[str, Path]):
    for kind in ("folded", "bundle"):
        halved, whole = (models[each].stat().st_size for each in (f"half {kind}", kind))
        assert 0.5 < halved / whole < 0.65


def test_nothing_in_the_graph_is_unused(graph: onnx.GraphProto):
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    assert {tensor.name for tensor in graph.initializer} <= used
    assert {value.name for value in graph.input} <= used
    assert all(set(node.output) & used for node in graph.node)


def test_the_file_says_nothing_of_the_machine_that_wrote_it(path: Path, kind: str):
    model = onnx.load(path)
    assert {entry.key for entry in model.metadata_props} == ({"vpdeploy"} if "folded" in kind else set())
    del model.metadata_props[:]
    assert (model.producer_name, model.doc_string, model.graph.doc_string) == ("vpdeploy", "", "")
    for node in model.graph.node:
        assert not node.metadata_props
        assert not node.doc_string
    data = model.SerializeToString()
    for trace in (b".py", b"site-packages", str(Path(tracing.__file__).parents[2]).encode()):
        assert trace not in data


def test_the_weights_are_inside_the_file(path: Path):
    model = onnx.load(path, load_external_data=False)
    assert {tensor.data_location for tensor in model.graph.initializer} == {TensorProto.DEFAULT}


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_every_batch_size_runs(path: Path, kind: str, random_pixels: MakePixels, batch: int):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds: dict[str, np.ndarray] = {"image": random_pixels(batch)}
    classes = 4
    if "folded" not in kind:
        classes = 3
        sizes = {"slots": 2 + batch, "prefix": 3 * batch, "classes": classes}
        feeds["slot"] = np.arange(batch, dtype=np.int32)
        for node in session.get_inputs()[2:]:
            dtype = np.float16 if node.type == "tensor(float16)" else np.float32
            feeds[node.name] = np.ones([sizes.get(size, size) for size in node.shape], dtype)
    (logits,) = session.run(["logits"], feeds)
    assert logits.shape == (batch, classes)
    assert np.isfinite(logits).all()


def test_prompts_and_positions_are_constants_of_the_folded_file(models: dict[str, Path]):
    shapes = [tuple(tensor.dims) for tensor in onnx.load(models["folded"]).graph.initializer]
    head_width = tiny_runs.WIDTH // HEADS
    # In block 1 only a shared key/value prompt is left, so one constant is both its key and its value.
    for length, count in zip(FLOWERS_PREFIX, (2, 1, 2), strict=True):
        # The last block's one product with its keys has them turned.
        turned = shapes.count((1, HEADS, head_width, length))
        assert shapes.count((1, HEADS, length, head_width)) + turned == count


def test_the_bundles_graph_holds_no_prompts(models: dict[str, Path], zoo: Path):
    data = onnx.load(models["bundle"])
    stored = [onnx.numpy_helper.to_array(tensor) for tensor in data.graph.initializer]
    for task in ("flowers", "birds"):
        keys = Bundle.open(zoo).read_task(task).tensors["prefix_key"]
        assert not any(
            array.size and np.isin(keys.ravel()[:3], array).all() for array in stored if array.dtype == keys.dtype
        )


def test_folded_metadata_is_self_contained(models: dict[str, Path], tiny_weights: Path):
    (entry,) = onnx.load(models["half folded"]).metadata_props
    fields = json.loads(entry.value)
    task = fields["task"]
    backbone = tiny_runs.backbone_of(tiny_weights)
    graph = fields["graph"]
    assert (fields["format"], graph["precision"], graph["opset"]) == ("vpdeploy.folded", "fp16", 20)
    assert task["labels"] == [f"flowers-{index}" for index in range(4)]
    assert task["method"] == "e2vpt"
    assert task["backbone"]["sha256"] == backbone.identity.sha256
    assert task["preprocessing"] == tiny_runs.PREPROCESSING.to_fields()
    assert {"parity", "pruning", "prompts"} <= task["details"].keys()


@pytest.mark.parametrize("opset", [17, 19, 21, 24])
def test_other_opsets_are_refused(opset: int):
    with pytest.raises(SpecError, match=f"--opset {opset}: choose one of 20, 23"):
        tracing.check_opset(opset)
