from __future__ import annotations

import json

import numpy as np
import pytest

from vpdeploy.errors import BundleCorruptError
from vpdeploy.format.tensorfile import decode_tensors, encode_tensors

SAMPLE = {
    "weight": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
    "half": np.array([1.5, -2.0, 65504.0], np.float16),
    "double": np.array([[1e300]], np.float64),
    "long": np.array([-1, 2**40], np.int64),
    "int": np.array([[-3], [4]], np.int32),
    "byte": np.array([0, 255, 7], np.uint8),
    "flag": np.array([True, False]),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((3, 0, 2), np.float32),
}


def encoded(header: object, body: bytes = b"") -> bytes:
    """A file with any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_golden_bytes_of_the_format():
    tensors = {"b": np.array([1.0], np.float32), "a": np.array([[1, 2]], np.uint8)}
    header = (
        b'{"a":{"dtype":"U8","shape":[1,2],"data_offsets":[0,2]},"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}'
    )
    padded = header + b" " * (-len(header) % 8)
    assert encode_tensors(tensors) == len(padded).to_bytes(8, "little") + padded + b"\x01\x02" + b"\x00\x00\x80\x3f"


def test_the_safetensors_library_reads_what_we_write():
    library = pytest.importorskip("safetensors.numpy")
    found = library.load(encode_tensors(SAMPLE))
    assert found.keys() == SAMPLE.keys()
    for name, array in SAMPLE.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)


def test_we_read_what_the_safetensors_library_writes():
    library = pytest.importorskip("safetensors.numpy")
    found = decode_tensors(library.save(SAMPLE, metadata={"format": "np"}), source="x")
    assert found.keys() == SAMPLE.keys()
    for name, array in SAMPLE.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)


def test_the_same_tensors_give_the_same_bytes_in_any_order():
    assert encode_tensors(dict(reversed(SAMPLE.items()))) == encode_tensors(SAMPLE)


def test_strided_and_big_endian_arrays_are_stored_by_value():
    array = np.arange(6, dtype=">f4").reshape(2, 3).T
    np.testing.assert_array_equal(decode_tensors(encode_tensors({"a": array}), source="x")["a"], array)


def test_arrays_that_were_read_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        decode_tensors(encode_tensors(SAMPLE), source="x")["weight"][0, 0] = 1


def test_a_file_without_tensors_is_valid():
    assert decode_tensors(encode_tensors({}), source="x") == {}


def test_truncation_at_every_byte_is_noticed():
    data = encode_tensors({"a": np.arange(3, dtype=np.float32), "b": np.zeros((1, 2), np.int64)})
    for length in range(len(data)):
        with pytest.raises(BundleCorruptError, match=r"^cut\.safetensors: "):
            decode_tensors(data[:length], source="cut.safetensors")


def test_bytes_after_the_last_tensor_are_noticed():
    with pytest.raises(BundleCorruptError, match="found 13"):
        decode_tensors(encode_tensors({"a": np.zeros(3, np.float32)}) + b"\x00", source="x")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(encoded({"a": entry(), "b": entry()}, bytes(8)), id="two tensors on the same bytes"),
        pytest.param(encoded({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), id="overlap"),
        pytest.param(encoded({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), id="gap"),
        pytest.param(encoded({"a": entry(offsets=(4, 12))}, bytes(12)), id="bytes before the first tensor"),
        pytest.param(encoded({"a": entry(offsets=(-8, 0))}, bytes(8)), id="negative offset"),
        pytest.param(encoded({"a": entry(offsets=(8, 0))}, bytes(8)), id="offsets reversed"),
        pytest.param(encoded({"a": entry(shape=(-2,))}, bytes(8)), id="negative size"),
        pytest.param(encoded({"a": entry(shape=(-1, -2))}, bytes(8)), id="negative sizes with the right product"),
        pytest.param(encoded({"a": entry(shape=(2**62, 2**62))}, bytes(8)), id="huge shape"),
        pytest.param(encoded({"a": entry(shape=(0, 10**30), offsets=(0, 0))}), id="huge shape without elements"),
        pytest.param(encoded({"a": entry(offsets=(0, 2**70))}, bytes(8)), id="huge offset"),
        pytest.param(encoded({"a": entry(shape=(float("inf"),))}, bytes(8)), id="infinite size"),
        pytest.param(encoded({"a": entry(shape=(2.0,))}, bytes(8)), id="fractional size"),
        pytest.param(encoded({"a": entry(shape=("2",))}, bytes(8)), id="size as text"),
        pytest.param(encoded({"a": entry(shape=2)}, bytes(8)), id="shape is no list"),
        pytest.param(encoded({"a": entry(shape=(1,) * 100)}, bytes(4)), id="too many axes"),
        pytest.param(encoded({"a": entry(offsets=(0, 8, 8))}, bytes(8)), id="three offsets"),
        pytest.param(encoded({"a": entry(offsets=None)}, bytes(8)), id="no offsets"),
        pytest.param(encoded({"a": entry(dtype=["F32"])}, bytes(8)), id="dtype is a list"),
        pytest.param(encoded({"a": {}}, b""), id="empty entry"),
        pytest.param(encoded({"a": 3}, b""), id="entry is a number"),
        pytest.param(encoded([1, 2]), id="header is a list"),
        pytest.param(encoded(b"null"), id="header is null"),
        pytest.param(encoded(b"{"), id="header is no JSON"),
        pytest.param(encoded(b'{"a":' + b"9" * 5000 + b"}"), id="number of thousands of digits"),
        pytest.param(encoded(b"\xff\xfe\xfd{}"), id="header is no text"),
        pytest.param(encoded(b"[" * 100_000), id="deeply nested header"),
        pytest.param((2**63).to_bytes(8, "little") + b"{}", id="huge header length"),
        pytest.param(
            encoded(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)), id="the same name twice"
        ),
    ],
)
def test_a_header_that_lies_is_refused(data: bytes):
    with pytest.raises(BundleCorruptError, match=r"^lie\.safetensors: "):
        decode_tensors(data, source="lie.safetensors")


def test_an_unsupported_dtype_is_named():
    with pytest.raises(BundleCorruptError, match=r"'a'.*BF16.*expected one of F64, F32, F16"):
        decode_tensors(encoded({"a": entry("BF16", (4,))}, bytes(8)), source="x")
