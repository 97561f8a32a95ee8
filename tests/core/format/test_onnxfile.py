from __future__ import annotations

from pathlib import Path

import pytest

from vpdeploy.errors import BundleError
from vpdeploy.format.onnxfile import OnnxGraph, append_metadata, read_graph, read_metadata, weights_bytes


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


def test_what_is_appended_follows_the_bytes_that_were_there(tmp_path: Path):
    path = written(tmp_path / "x.onnx", IR_VERSION, PRODUCER)
    append_metadata(path, {"key": "val"})
    assert path.read_bytes() == IR_VERSION + PRODUCER + ENTRY
    append_metadata(path, {"läng": "é" * 40_000, "empty": ""})
    assert read_metadata(path) == {"key": "val", "läng": "é" * 40_000, "empty": ""}


def test_other_readers_find_what_was_appended_and_run_the_graph_as_before(folded_flowers: Path, tmp_path: Path):
    onnx = pytest.importorskip("onnx", reason="needs the export extra")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    path = tmp_path / "x.onnx"
    path.write_bytes(folded_flowers.read_bytes())
    append_metadata(path, {"note": "a" * 300})
    before, after = onnx.load(folded_flowers), onnx.load(path)
    onnx.checker.check_model(str(path), full_check=True)
    assert {entry.key for entry in after.metadata_props} == {"vpdeploy", "note"}
    assert after.graph == before.graph
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["note"] == "a" * 300


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


# --- the graph ---


def field(number: int, data: bytes) -> bytes:
    """A length-delimited field of a protobuf message; both lengths are below 128."""
    assert len(data) < 128
    return bytes([number << 3 | 2, len(data)]) + data


def number(tag: int, value: int) -> bytes:
    return bytes([tag << 3, value])


def tensor(name: str, kind: int, *sizes: int, packed: bool = False) -> bytes:
    """A TensorProto: dims 1, data_type 2, name 8."""
    dims = field(1, bytes(sizes)) if packed else b"".join(number(1, size) for size in sizes)
    return dims + number(2, kind) + field(8, name.encode())


def image_input(name: str, kind: int) -> bytes:
    """A ValueInfoProto: name 1, type 2 { tensor_type 1 { elem_type 1 } }."""
    return field(1, name.encode()) + field(2, field(1, number(1, kind)))


def opset(version: int, domain: str = "") -> bytes:
    return field(8, (field(1, domain.encode()) if domain else b"") + number(2, version))


def write(path: Path, graph: bytes, *more: bytes) -> Path:
    path.write_bytes(number(1, 10) + field(7, graph) + b"".join(more))
    return path


def test_initializers_are_counted_by_type(tmp_path: Path):
    graph = field(5, tensor("a", 1, 3, 5)) + field(5, tensor("b", 10, 7, packed=True)) + field(5, tensor("c", 7))
    found = read_graph(write(tmp_path / "x.onnx", graph))
    assert found.elements == {"float32": 15, "float16": 7, "int64": 1}
    assert found.weight_type == "float32"


def test_inputs_are_those_that_are_no_initializers(tmp_path: Path):
    graph = field(11, image_input("image", 2)) + field(11, image_input("w", 1)) + field(5, tensor("w", 1, 4))
    assert read_graph(write(tmp_path / "x.onnx", graph)).inputs == {"image": "uint8"}


def test_the_opset_is_that_of_the_standard_operators(tmp_path: Path):
    found = read_graph(write(tmp_path / "x.onnx", b"", opset(1, "com.microsoft"), opset(20), opset(3, "ai.x")))
    assert found.opset == 20


def test_a_file_without_a_graph_tells_nothing(tmp_path: Path):
    found = read_graph(write(tmp_path / "x.onnx", b""))
    assert found == OnnxGraph()
    assert found.weight_type is None


def test_files_beside_it_are_named_once_and_counted(tmp_path: Path):
    location = field(13, field(1, b"location") + field(2, b"x.data"))
    offset = field(13, field(1, b"offset") + field(2, b"4"))
    graph = field(5, tensor("a", 1, 2) + location) + field(5, tensor("b", 1, 2) + offset + location)
    path = write(tmp_path / "x.onnx", graph)
    found = read_graph(path)
    assert found.external_files == ("x.data",)
    with pytest.raises(BundleError, match=r"x\.data: cannot be read: .*; it holds weights of x\.onnx"):
        weights_bytes(path, found)
    (tmp_path / "x.data").write_bytes(bytes(16))
    assert weights_bytes(path, found) == (path.stat().st_size, 16)


@pytest.mark.parametrize("data", [b"", b"text", number(1, 10) + b"\x3a\x7f", b"\x3a\x02\x2a\x7f"])
def test_a_graph_that_is_none_is_one_line(tmp_path: Path, data: bytes):
    (tmp_path / "x.onnx").write_bytes(data)
    with pytest.raises(BundleError, match=r"x\.onnx: not an ONNX file, or truncated"):
        read_graph(tmp_path / "x.onnx")


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


@pytest.mark.parametrize(
    "tensor_fields",
    [
        bytes([1 << 3]) + varint(2**64 - 1),
        b"".join([bytes([1 << 3]) + varint(2**62)] * 3),
        field(13, field(1, b"location") + field(2, b"x\0.data")),
    ],
    ids=["a negative size", "more elements than int64 counts", "a file name with a zero byte"],
)
def test_a_tensor_that_cannot_be_is_one_line(tmp_path: Path, tensor_fields: bytes):
    path = write(tmp_path / "x.onnx", field(5, tensor("a", 1) + tensor_fields))
    with pytest.raises(BundleError, match=r"x\.onnx: not an ONNX file, or truncated"):
        read_graph(path)


def test_a_graph_agrees_with_the_onnx_library(folded_flowers: Path):
    onnx = pytest.importorskip("onnx", reason="needs the export extra")
    model = onnx.load(folded_flowers)
    found = read_graph(folded_flowers)
    assert found.opset == next(each.version for each in model.opset_import if each.domain == "")
    assert found.inputs == {"image": "uint8"}
    expected: dict[str, int] = {}
    for each in model.graph.initializer:
        array = onnx.numpy_helper.to_array(each)
        expected[str(array.dtype)] = expected.get(str(array.dtype), 0) + array.size
    assert found.elements == expected
