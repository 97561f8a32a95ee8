"""What NVIDIA's parser found of a graph's inputs and outputs, compared with what they should be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vpdeploy.artifact import Artifact
from vpdeploy.errors import BuildError
from vpdeploy.interface import Binding, Interface

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
}
"""NumPy's names by those of ``DataType``."""


def checked_interface(network: Any, artifact: Artifact) -> Interface:
    """Return an artifact's interface after comparing the network that was parsed from its graph with it.

    Args:
        network: An ``INetworkDefinition``.
        artifact: What it was parsed from.

    Raises:
        BuildError: An input or output is missing, superfluous, or of another shape or dtype.
    """
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    expected = artifact.interface
    _compare(artifact, "input", inputs, expected.inputs)
    _compare(artifact, "output", outputs, expected.outputs)
    return expected


def dtype_name(dtype: Any) -> str:
    """Return NumPy's name of a ``DataType``."""
    return _DTYPES.get(dtype.name, str(dtype.name).lower())


def _compare(artifact: Artifact, kind: str, found: list[Any], expected: Mapping[str, Binding]) -> None:
    names = [tensor.name for tensor in found]
    if sorted(names) != sorted(expected):
        raise BuildError(
            f"{artifact.graph_path}: expected the {kind}s {sorted(expected)}, found {sorted(names)}; export again"
        )
    for tensor in found:
        binding = expected[tensor.name]
        dtype, shape = dtype_name(tensor.dtype), tuple(tensor.shape)
        sizes = tuple(-1 if isinstance(size, str) else size for size in binding.shape)
        named = _axis_names(tensor, shape, binding)
        if dtype != binding.dtype or shape != sizes or named != binding.shape:
            raise BuildError(
                f"{artifact.graph_path}: {kind} '{tensor.name}' should be {binding.dtype} {list(binding.shape)}, "
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
