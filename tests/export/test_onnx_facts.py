from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import tiny_runs

from vpdeploy.format.bundle import Bundle
from vpdeploy_export.onnx.facts import block_of, evaluate_size, graph_facts

SIZES = {"prefix": 16, "classes": 7, "slots": 3}


@pytest.fixture(scope="module")
def facts(zoo: Path) -> dict[str, object]:
    return graph_facts(ir.load(Bundle.open(zoo).verified_graph()), SIZES)


def test_the_work_for_one_image_is_counted_by_hand(facts: dict[str, object]):
    tokens, patches, width, prefix = tiny_runs.TOKENS, tiny_runs.PATCHES, tiny_runs.WIDTH, SIZES["prefix"]
    hidden = 2 * width

    def block(rows: int) -> int:
        linear = rows * (4 * width**2 + 2 * width * hidden)
        return linear + 2 * rows * (rows + prefix) * width

    # The class token's query, carried by the key projection, and what it gathered, carried by the value projection.
    carried = 2 * width**2 + width + 2 * tiny_runs.HEADS * tokens * width + 2 * prefix * width
    last = 2 * width**2 + 2 * width * hidden + carried
    embedding = patches * (tiny_runs.PATCH**2 * 3) * width
    assert facts["macs_per_image"] == embedding + 2 * block(tokens) + last + width * SIZES["classes"]


def test_each_block_names_its_types(facts: dict[str, object]):
    types = {"matmul": "float32", "norm": "float32", "softmax": "float32"}
    assert facts["blocks"] == [{"name": f"blocks.{index}", **types} for index in range(tiny_runs.DEPTH)]


def test_nodes_and_operators_are_those_of_the_graph(facts: dict[str, object]):
    operators: dict[str, int] = facts["operators"]  # type: ignore[assignment]
    assert sum(operators.values()) == facts["nodes"]
    assert operators["Softmax"] == tiny_runs.DEPTH
    assert operators["LayerNormalization"] == 2 * tiny_runs.DEPTH + 1


def test_parameters_are_those_of_the_backbone_but_for_what_is_folded(facts: dict[str, object]):
    vit = tiny_runs.vit_fixture_patch8_32()
    whole = sum(each.numel() for each in vit.parameters())
    # Gains and shifts of the pre-attention norms, the patch embedding's bias and the qkv's single bias move elsewhere.
    assert abs(facts["parameters"] - whole) < 0.05 * whole  # type: ignore[operator]


def test_elements_are_counted_by_type_over_all_constants(facts: dict[str, object], zoo: Path):
    expected: Counter[str] = Counter()
    for each in onnx.load(Bundle.open(zoo).verified_graph()).graph.initializer:
        array = onnx.numpy_helper.to_array(each)
        expected[str(array.dtype)] += array.size
    assert facts["elements"] == expected
    assert expected["float32"] == facts["parameters"]


@pytest.mark.parametrize(
    ("expression", "value"),
    [("batch", 1), ("197*batch", 197), ("prefix + 197", 213), ("2*(generated + prefix) + 3", 51)],
)
def test_symbolic_sizes_are_evaluated(expression: str, value: int):
    assert evaluate_size(expression, {"batch": 1, "prefix": 16, "generated": 8}) == value


@pytest.mark.parametrize("expression", ["other", "batch**2", "__import__('os')", "batch - 1"])
def test_other_expressions_are_refused(expression: str):
    with pytest.raises(ValueError, match="cannot be counted"):
        evaluate_size(expression, {"batch": 1})


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("blocks.3.mlp.fc1.Gemm", "blocks.3"),
        ("blocks.11.Softmax_1", "blocks.11"),
        ("embedding.0.Add", None),
        ("Add", None),
    ],
)
def test_the_block_is_read_from_a_name(name: str, block: str | None):
    assert block_of(name) == block
