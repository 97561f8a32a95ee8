from __future__ import annotations

import dataclasses
import json
import re

import pytest
from core.engines.conftest import card_of, plan_of

from vpdeploy.engines.plan import EngineCard, EngineOptions
from vpdeploy.engines.profile import AxisRange, Profile
from vpdeploy.errors import BundleCorruptError, BundleVersionError
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.document import Document, to_json


def test_the_key_begins_with_what_a_person_looks_for(toy_artifact: Artifact):
    assert re.fullmatch(r"tensorrt-rtx-1\.7-sm_86-sm_89-fp32-[0-9a-f]{12}", plan_of(toy_artifact).key)


@pytest.mark.parametrize(
    "change",
    [
        {"runtime": "tensorrt"},
        {"runtime_version": "1.7.1.117"},
        {"targets": ("sm_86",)},
        {"gpu_name": "NVIDIA L4"},
        {"platform": "linux-x86_64"},
        {"precision": "fp16"},
        {"profile": Profile().add("batch", AxisRange(1, 8, 33)).add("slots", AxisRange(1, 64, 1024))},
        {"graph_sha256": "00" * 32},
        *({"options": EngineOptions(**{name: True})} for name in ("version_compatible", "weight_stripped")),
        {"options": EngineOptions(hardware="same-sm")},
        {"options": EngineOptions(workspace_bytes=1)},
    ],
    ids=str,
)
def test_everything_that_decides_an_engine_is_in_its_key(toy_artifact: Artifact, change):
    assert plan_of(toy_artifact, **change).key != plan_of(toy_artifact).key


def test_equal_plans_have_equal_keys_whatever_came_of_them(toy_artifact: Artifact):
    assert card_of(toy_artifact, b"one").key == card_of(toy_artifact, b"another").key == plan_of(toy_artifact).key


def test_a_card_is_read_as_it_was_written(toy_artifact: Artifact):
    card = card_of(toy_artifact, b"engine", gpu_name="NVIDIA L4", platform="linux-x86_64")
    assert EngineCard.from_document(Document.parse(to_json(card.to_fields()), source="card")) == card


def test_the_card_has_the_fields_that_its_format_documents(toy_artifact: Artifact):
    fields = json.loads(to_json(card_of(toy_artifact, b"engine").to_fields()))
    assert fields["format"] == "vpdeploy.engine"
    assert fields["profile"] == {"batch": [1, 8, 32], "slots": [1, 64, 1024]}
    assert fields["inputs"] == {"image": {"dtype": "uint8", "shape": ["batch", 8, 8, 3]}}
    assert set(fields) == {
        *("format", "format_version", "runtime", "runtime_version", "targets", "gpu_name", "platform", "precision"),
        *("profile", "graph_sha256", "options", "layout_digest", "inputs", "outputs", "size_bytes", "sha256"),
        "build_seconds",
    }


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"profile": {"batch": [8, 1, 32]}}, r"'batch' should be \[min, opt, max\]"),
        ({"profile": {"batch": [1, 8]}}, r"'batch' should be \[min, opt, max\]"),
        ({"precision": "int8"}, "unknown precision"),
        ({"runtime": "openvino"}, "unknown runtime"),
        ({"targets": "sm_86"}, "'targets' should be list"),
        ({"inputs": {"image": {"dtype": "uint8", "shape": [None]}}}, "impossible shape"),
        ({"size_bytes": True}, "should be int, found bool"),
        ({"options": {}}, "'hardware' is missing"),
        ({"format": "vpdeploy.bundle"}, "expected format 'vpdeploy.engine'"),
    ],
)
def test_a_damaged_card_is_refused_with_the_field(toy_artifact: Artifact, change, complaint):
    fields = {**card_of(toy_artifact, b"engine").to_fields(), **change}
    with pytest.raises(BundleCorruptError, match=complaint):
        EngineCard.from_document(Document("card", fields))


def test_a_card_of_another_format_version_is_refused(toy_artifact: Artifact):
    fields = {**card_of(toy_artifact, b"engine").to_fields(), "format_version": 2}
    with pytest.raises(BundleVersionError):
        EngineCard.from_document(Document("card", fields))


def test_a_plan_cannot_be_changed(toy_artifact: Artifact):
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan_of(toy_artifact).runtime = "tensorrt"  # type: ignore[misc]
