"""Facts of a graph for people: size, operations, work for one image, types block by block."""

from __future__ import annotations

import ast
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from vpdeploy.format.layout import BATCH_AXIS

_ROLES = {
    "MatMul": "matmul",
    "Gemm": "matmul",
    "Attention": "matmul",
    "LayerNormalization": "norm",
    "Softmax": "softmax",
}


def graph_facts(model: ir.Model, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return a graph's facts in JSON's types.

    Args:
        model: With shapes inferred and nodes named by module.
        sizes: Sizes of the table's axes to count the work with, e.g. ``{"prefix": 16, "classes": 10}``.

    Returns:
        ``nodes``, ``operators`` by type, ``parameters`` and ``initializer_bytes`` of constants with two or more axes,
        ``elements`` by type of all constants, ``macs_per_image`` (multiply-accumulates of matrix products), and for
        each of ``blocks`` the types of its products, norms and softmax.
    """
    known = {**sizes, BATCH_AXIS: 1}
    constants = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    weights = [constant for constant in constants if constant.dtype.is_floating_point()]
    elements: Counter[str] = Counter()
    for constant in constants:
        elements[str(constant.dtype.numpy())] += constant.size
    blocks: dict[str, dict[str, set[str]]] = {}
    for node in model.graph:
        place, role = block_of(node.name or ""), _ROLES.get(node.op_type)
        if place is not None and role is not None and node.outputs[0].dtype is not None:
            blocks.setdefault(place, {}).setdefault(role, set()).add(str(node.outputs[0].dtype.numpy()))
    return {
        "nodes": len(model.graph),
        "operators": dict(Counter(node.op_type for node in model.graph).most_common()),
        "parameters": sum(constant.size for constant in weights),
        "initializer_bytes": sum(constant.nbytes for constant in weights),
        "elements": dict(elements.most_common()),
        "macs_per_image": sum(_macs(node, known) for node in model.graph),
        "blocks": [
            {"name": name, **{role: "+".join(sorted(types)) for role, types in roles.items()}}
            for name, roles in blocks.items()
        ],
    }


def block_of(name: str) -> str | None:
    """Return ``blocks.N`` of a name such as ``blocks.3.mlp.fc1.MatMul``, or None outside the blocks."""
    first, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    return f"blocks.{number}" if first == "blocks" and number.isdecimal() else None


def _macs(node: ir.Node, sizes: Mapping[str, int]) -> int:
    """Return a product's multiply-accumulates: its output's numbers times the length it sums over."""
    if node.op_type in ("MatMul", "Gemm"):
        inner = _shape(node.inputs[0], sizes)[-1]
        return math.prod(_shape(node.outputs[0], sizes)) * inner
    if node.op_type == "Attention":  # q [B, H, M, d], k and v [B, H, K, d]
        query, key = _shape(node.inputs[0], sizes), _shape(node.inputs[1], sizes)
        return 2 * math.prod(query) * key[-2]
    return 0


def _shape(value: ir.Value | None, sizes: Mapping[str, int]) -> list[int]:
    """Return a value's shape as numbers."""
    if value is None or value.shape is None:
        raise ValueError("a product's shape was not inferred")
    return [size if isinstance(size, int) else evaluate_size(str(size.value), sizes) for size in value.shape]


def evaluate_size(expression: str, sizes: Mapping[str, int]) -> int:
    """Evaluate a symbolic size such as ``197*batch`` or ``prefix + 197``.

    Raises:
        ValueError: It holds another name than ``sizes``, or another operation than sums and products.
    """

    def evaluate(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.Name(id=name) if name in sizes:
                return sizes[name]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return evaluate(left) + evaluate(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return evaluate(left) * evaluate(right)
        raise ValueError(f"size '{expression}' cannot be counted with {sorted(sizes)}")

    return evaluate(ast.parse(expression, mode="eval").body)
