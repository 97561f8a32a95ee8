"""A graph's inputs and outputs: what the layout says they are, and what NVIDIA's parser found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vpdeploy.deployed import DeployedGraph
from vpdeploy.engines.card import Binding
from vpdeploy.errors import BuildError
from vpdeploy.layout import BATCH_AXIS, CLASS_AXIS, IMAGE, LOGITS, SLOT, SLOT_AXIS

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
}
"""NumPy's names by those of ``DataType``."""


@dataclass(frozen=True, kw_only=True)
class Interface:
    """Inputs and outputs by name, in the graph's order; a name in a shape stands for a dynamic axis."""

    inputs: Mapping[str, Binding]
    outputs: Mapping[str, Binding]


def expected_interface(graph: DeployedGraph, *, image_dtype: str = "uint8") -> Interface:
    """Return the inputs and outputs that a graph should have.

    Args:
        graph: A bundle's or a folded model's.
        image_dtype: ``uint8`` for [B, H, W, 3]; ``float32`` for [B, 3, H, W], which only folded models may take.
    """
    side = graph.preprocessing.image_size
    shape = (side, side, 3) if image_dtype == "uint8" else (3, side, side)
    inputs = {IMAGE: Binding(dtype=image_dtype, shape=(BATCH_AXIS, *shape))}
    classes: int | str = CLASS_AXIS
    if graph.layout is not None:
        inputs[SLOT] = Binding(dtype="int32", shape=(BATCH_AXIS,))
        for spec in graph.layout.tensors:
            inputs[spec.name] = Binding(dtype=spec.dtype, shape=(SLOT_AXIS, *spec.shape))
    elif graph.folded is not None:
        classes = len(graph.folded.task.labels)
    return Interface(inputs=inputs, outputs={LOGITS: Binding(dtype="float32", shape=(BATCH_AXIS, classes))})


def checked_interface(network: Any, graph: DeployedGraph) -> Interface:
    """Return a parsed network's interface after comparing it with what the graph should have.

    Args:
        network: An ``INetworkDefinition``.
        graph: What it was parsed from.

    Raises:
        BuildError: An input or output is missing, superfluous, or of another shape or dtype.
    """
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    image = next((each for each in inputs if each.name == IMAGE), None)
    takes_floats = graph.layout is None and image is not None and dtype_name(image.dtype) == "float32"
    expected = expected_interface(graph, image_dtype="float32" if takes_floats else "uint8")
    _compare(graph, "input", inputs, expected.inputs)
    _compare(graph, "output", outputs, expected.outputs)
    return expected


def dtype_name(dtype: Any) -> str:
    """Return NumPy's name of a ``DataType``."""
    return _DTYPES.get(dtype.name, str(dtype.name).lower())


def _compare(graph: DeployedGraph, kind: str, found: list[Any], expected: Mapping[str, Binding]) -> None:
    names = [tensor.name for tensor in found]
    if sorted(names) != sorted(expected):
        raise BuildError(f"{graph.path}: expected the {kind}s {sorted(expected)}, found {sorted(names)}; export again")
    for tensor in found:
        binding = expected[tensor.name]
        dtype, shape = dtype_name(tensor.dtype), tuple(tensor.shape)
        sizes = tuple(-1 if isinstance(size, str) else size for size in binding.shape)
        named = _axis_names(tensor, shape, binding)
        if dtype != binding.dtype or shape != sizes or named != binding.shape:
            raise BuildError(
                f"{graph.path}: {kind} '{tensor.name}' should be {binding.dtype} {list(binding.shape)}, "
                f"found {dtype} {list(named)}; export again"
            )


def _axis_names(tensor: Any, shape: tuple[int, ...], binding: Binding) -> tuple[int | str, ...]:
    """Return a tensor's shape with the names that the parser kept of its dynamic axes.

    An output's names are not kept, nor are all by every version; where there is none, the expected one is assumed.
    """
    named: list[int | str] = list(shape)
    for axis, size in enumerate(shape):
        if size == -1:
            assumed = binding.shape[axis] if axis < len(binding.shape) else -1
            named[axis] = tensor.get_dimension_name(axis) or assumed
    return tuple(named)
