from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from core import toy

from vpdeploy.errors import BundleCorruptError, BundleError
from vpdeploy.format.bundle import Bundle, write_bundle
from vpdeploy.format.datafile import METADATA_KEY, DataFile, data_file_of
from vpdeploy.format.document import Document
from vpdeploy.format.manifest import Manifest

WEIGHTS = b"many weights"
DATA = DataFile(name="model.0a1b2c3d4e5f.data", sha256=hashlib.sha256(WEIGHTS).hexdigest(), size_bytes=len(WEIGHTS))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A bundle whose graph has a data file."""
    staged = tmp_path / "staged"
    staged.mkdir()
    (staged / "model.onnx").write_bytes(b"not a graph")
    (staged / DATA.name).write_bytes(WEIGHTS)
    return write_bundle(tmp_path / "zoo", toy.facts(), [toy.prompt_set()], staged / "model.onnx", data=DATA).path


def test_the_json_form_is_read_as_it_was_written():
    assert DataFile.from_document(Document("x", DATA.to_fields())) == DATA
    assert DataFile.from_metadata(DATA.to_metadata(), source="x") == DATA
    assert DataFile.from_metadata({}, source="x") is None


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("file", "../model.data", "is not the name of a data file beside the graph"),
        ("file", 3, "should be str"),
        ("sha256", None, "should be str"),
        ("size_bytes", "12", "should be int"),
    ],
)
def test_damaged_metadata_is_refused(field: str, value: Any, message: str):
    metadata = {METADATA_KEY: json.dumps({**DATA.to_fields(), field: value})}
    with pytest.raises(BundleCorruptError, match=f"model.onnx: data file.*{message}"):
        DataFile.from_metadata(metadata, source="model.onnx")


def test_a_manifest_without_a_data_file_says_nothing_of_one():
    assert "data" not in toy.manifest().to_fields()["graph"]
    fields = toy.manifest(graph_data=DATA).to_fields()
    assert Manifest.from_document(Document("manifest.json", fields)).graph_data == DATA


def test_a_bundle_holds_and_checks_its_graphs_data_file(path: Path):
    assert (path / DATA.name).read_bytes() == WEIGHTS
    assert Bundle.open(path).manifest.graph_data == DATA
    assert Bundle.open(path).verified_graph() == path / "model.onnx"


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "the graph's data file is missing"),
        (WEIGHTS[:-1], f"expected {len(WEIGHTS)} bytes, found {len(WEIGHTS) - 1}"),
        (WEIGHTS[::-1], "contents do not match the sha256"),
    ],
    ids=["missing", "truncated", "changed"],
)
def test_a_bundles_damaged_data_file_is_named(path: Path, contents: bytes | None, message: str):
    (path / DATA.name).unlink()
    if contents is not None:
        (path / DATA.name).write_bytes(contents)
    with pytest.raises(BundleCorruptError, match=f"{path / DATA.name}: {message}"):
        Bundle.open(path).verified_graph()


def test_what_is_no_graph_has_no_data_file(tmp_path: Path):
    (tmp_path / "x.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match="not an ONNX file, or truncated"):
        data_file_of(tmp_path / "x.onnx")


def test_a_smaller_graph_leaves_no_data_file_behind(path: Path):
    toy.write(path, graph=b"a smaller graph")
    assert Bundle.open(path).manifest.graph_data is None
    assert list(path.glob("*.data")) == []
