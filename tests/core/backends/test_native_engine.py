from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from core.backends.fake_tensorrt import Diagnostics, Knobs, Validity
from core.backends.native_host import open_host
from core.backends.tables import MakePixels

from vpdeploy.engines.plan import EngineOptions
from vpdeploy.errors import EngineIncompatibleError
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.layout import Layout


def test_an_engine_that_the_runtime_calls_invalid_is_refused_with_its_reasons(artifact: Artifact, tmp_path: Path):
    knobs = Knobs()
    knobs.validity = (Validity.INVALID, Diagnostics.VERSION_MISMATCH | Diagnostics.UNSUPPORTED_CC)
    with pytest.raises(
        EngineIncompatibleError,
        match=r"TensorRT-RTX 1.7.1.116 refuses it \(version_mismatch, unsupported_cc\).*run: vpdeploy",
    ):
        open_host(artifact, tmp_path, runtime="tensorrt-rtx", knobs=knobs)


def test_an_engine_that_cannot_be_deserialised_is_refused_with_tensorrts_words(artifact: Artifact, tmp_path: Path):
    knobs = Knobs()
    knobs.corrupt = True
    with pytest.raises(EngineIncompatibleError, match=r"Serialization assertion failed.*vpdeploy build .* --force"):
        open_host(artifact, tmp_path, knobs=knobs)


def test_an_engine_of_another_layout_is_refused_by_name(artifact: Artifact, tmp_path: Path):
    assert artifact.layout is not None
    tensors = [
        replace(spec, dtype="float16") if spec.name == "prefix_key" else spec for spec in artifact.layout.tensors
    ]
    other = replace(artifact, layout=Layout(tensors=tuple(tensors)))
    with pytest.raises(EngineIncompatibleError, match=r"'prefix_key' should be float16 .*, found float32"):
        open_host(other, tmp_path)


def test_a_stripped_engine_takes_its_weights_from_the_graph(
    artifact: Artifact, tmp_path: Path, random_pixels: MakePixels
):
    native = open_host(artifact, tmp_path, options=EngineOptions(weight_stripped=True))
    assert native.knobs.refitted == [str(artifact.graph_path)]


def test_host_code_is_allowed_for_version_compatible_engines_alone(artifact: Artifact, tmp_path: Path):
    knobs = Knobs()
    knobs.holds_host_code = True
    open_host(artifact, tmp_path, knobs=knobs, options=EngineOptions(version_compatible=True)).backend.close()
    with pytest.raises(EngineIncompatibleError, match="host code, which is not allowed"):
        open_host(artifact, tmp_path, knobs=knobs)
