from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from vpdeploy.engines.network import checked_interface
from vpdeploy.errors import BuildError
from vpdeploy.format.artifact import Artifact

TOY = {
    "image": ("UINT8", ("batch", 8, 8, 3)),
    "slot": ("INT32", ("batch",)),
    "prefix_key": ("FLOAT", ("slots", 2, 2, "prefix", 3)),
    "prefix_value": ("FLOAT", ("slots", 2, 2, "prefix", 3)),
    "prefix_bias": ("FLOAT", ("slots", 2, "prefix")),
    "head_weight": ("FLOAT", ("slots", 6, "classes")),
    "head_bias": ("FLOAT", ("slots", "classes")),
}
"""The toy bundle's inputs, written out: 2 blocks, 2 heads of width 3, images of 8 by 8."""


def tensor(name: str, dtype: str, shape: tuple[Any, ...], *, named: bool = True) -> Any:
    return SimpleNamespace(
        name=name,
        dtype=SimpleNamespace(name=dtype),
        shape=tuple(-1 if isinstance(size, str) else size for size in shape),
        get_dimension_name=lambda axis: shape[axis] if named else None,
    )


def network(inputs: dict[str, Any], output: Any = ("FLOAT", ("batch", "classes")), *, named: bool = True) -> Any:
    tensors = [tensor(name, *spec, named=named) for name, spec in inputs.items()]
    outputs = [tensor("logits", *output, named=False)]
    return SimpleNamespace(
        num_inputs=len(tensors),
        get_input=tensors.__getitem__,
        num_outputs=1,
        get_output=outputs.__getitem__,
    )


@pytest.mark.parametrize("named", [True, False])
def test_the_network_of_the_layout_is_accepted(toy_artifact: Artifact, named: bool):
    found = checked_interface(network(TOY, named=named), toy_artifact)
    dtypes = {"UINT8": "uint8", "INT32": "int32", "FLOAT": "float32"}
    assert {name: (each.dtype, each.shape) for name, each in found.inputs.items()} == {
        name: (dtypes[dtype], shape) for name, (dtype, shape) in TOY.items()
    }
    assert found == toy_artifact.interface


@pytest.mark.parametrize(
    ("name", "spec", "complaint"),
    [
        ("image", ("FLOAT", ("batch", 3, 8, 8)), r"input 'image' should be uint8 \['batch', 8, 8, 3\], found float32"),
        ("image", ("UINT8", ("batch", 16, 16, 3)), r"found uint8 \['batch', 16, 16, 3\]"),
        ("image", ("UINT8", (1, 8, 8, 3)), r"found uint8 \[1, 8, 8, 3\]; export again"),
        ("prefix_key", ("HALF", TOY["prefix_key"][1]), "'prefix_key' should be float32"),
        ("prefix_key", ("FLOAT", ("slots", 2, 2, "prefix")), "'prefix_key' should be"),
        ("prefix_bias", ("FLOAT", ("slots", 2, "batch")), r"found float32 \['slots', 2, 'batch'\]"),
    ],
)
def test_an_input_of_another_shape_or_dtype_is_refused(toy_artifact: Artifact, name, spec, complaint):
    with pytest.raises(BuildError, match=complaint):
        checked_interface(network({**TOY, name: spec}), toy_artifact)


@pytest.mark.parametrize("output", [("HALF", ("batch", "classes")), ("FLOAT", ("batch", 4))])
def test_an_output_of_another_shape_or_dtype_is_refused(toy_artifact: Artifact, output):
    with pytest.raises(BuildError, match=r"output 'logits' should be float32 \['batch', 'classes'\]"):
        checked_interface(network(TOY, output), toy_artifact)


def test_missing_and_superfluous_inputs_are_named(toy_artifact: Artifact):
    fewer = {name: spec for name, spec in TOY.items() if name != "slot"}
    with pytest.raises(BuildError, match=r"expected the inputs \[.*'slot'\], found"):
        checked_interface(network(fewer), toy_artifact)
    with pytest.raises(BuildError, match=r"found .*'surplus'"):
        checked_interface(network({**TOY, "surplus": ("FLOAT", (1,))}), toy_artifact)


@pytest.mark.parametrize(
    ("image_input", "spec", "dtype"),
    [
        ("uint8", ("UINT8", ("batch", 32, 32, 3)), "uint8"),
        ("float", ("FLOAT", ("batch", 3, 32, 32)), "float32"),
    ],
)
def test_a_folded_model_takes_bytes_or_floats_as_recorded(folded_flowers, image_input, spec, dtype):
    opened = Artifact.open(folded_flowers)
    artifact = replace(opened, graph=replace(opened.graph, image_input=image_input))
    found = checked_interface(network({"image": spec}, ("FLOAT", ("batch", 4))), artifact)
    assert found.inputs["image"].dtype == dtype
    other = replace(opened, graph=replace(opened.graph, image_input="float" if image_input == "uint8" else "uint8"))
    with pytest.raises(BuildError, match="input 'image' should be"):
        checked_interface(network({"image": spec}, ("FLOAT", ("batch", 4))), other)
