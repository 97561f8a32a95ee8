from __future__ import annotations

from pathlib import Path

import pytest

from vpdeploy.errors import BundleError
from vpdeploy.onnxfile import read_metadata


def written(path: Path, *fields: bytes) -> Path:
    path.write_bytes(b"".join(fields))
    return path


IR_VERSION = b"\x08\x0a"  # field 1, varint 10
PRODUCER = b"\x12\x03abc"  # field 2, three bytes
ENTRY = b"\x72\x0a" + b"\x0a\x03key" + b"\x12\x03val"  # field 14: {1: "key", 2: "val"}


def test_metadata_are_found_among_other_fields(tmp_path: Path):
    assert read_metadata(written(tmp_path / "x.onnx", IR_VERSION, PRODUCER, ENTRY)) == {"key": "val"}


def test_a_file_without_metadata_has_none(tmp_path: Path):
    assert read_metadata(written(tmp_path / "x.onnx", IR_VERSION, PRODUCER)) == {}


def test_an_entry_without_a_value_has_an_empty_one(tmp_path: Path):
    assert read_metadata(written(tmp_path / "x.onnx", b"\x72\x05\x0a\x03key")) == {"key": ""}


def test_metadata_agree_with_the_onnx_library(folded_flowers: Path):
    onnx = pytest.importorskip("onnx", reason="needs the export extra")
    model = onnx.load(folded_flowers)
    assert read_metadata(folded_flowers) == {entry.key: entry.value for entry in model.metadata_props}


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\x00\x00",
        b"\x72",
        b"\x72\x0a\x0a",
        b"\x72\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x0f\x01",
        b"\x72\x03\x0a\x09k",
        b"\x72\x05\x0a\x03\xff\xfe\xfd",
        b"\x7fELF\x02\x01\x01",
    ],
)
def test_what_is_no_onnx_file_is_refused_by_name(tmp_path: Path, damage: bytes):
    path = written(tmp_path / "x.onnx", IR_VERSION if damage else b"", damage)
    with pytest.raises(BundleError, match=r"x\.onnx: not an ONNX file, or truncated"):
        read_metadata(path)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(BundleError, match=r"x\.onnx: cannot be read: No such file"):
        read_metadata(tmp_path / "x.onnx")
