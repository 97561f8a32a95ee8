"""What an ONNX file says, read and added to without a library: a protobuf message is a row of tagged fields.

The runtime knows no ``onnx``, and a native engine's graph is never loaded. The metadata of a file that ``vpdeploy
export`` writes say all there is to know. Where another tool wrote it, or a version 1 of ours, the graph itself is read:
its inputs, the types of its weights, the files beside it.
"""

from __future__ import annotations

import mmap
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vpdeploy.errors import BundleError

# Field numbers of onnx.proto, by message.
_MODEL_GRAPH, _MODEL_OPSET, _MODEL_METADATA = 7, 8, 14
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2
_GRAPH_INITIALIZER, _GRAPH_INPUT = 5, 11
_VALUE_NAME, _VALUE_TYPE = 1, 2
_TYPE_TENSOR, _TENSOR_ELEMENT = 1, 1
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_EXTERNAL = 1, 2, 8, 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2

_TYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    12: "uint32",
    13: "uint64",
    16: "bfloat16",
}
"""TensorProto.DataType."""

_MOST_ELEMENTS = 2**63 - 1

_STANDARD_DOMAINS = ("", "ai.onnx")

Span = tuple[int, int]

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, kw_only=True)
class OnnxGraph:
    """An ONNX file's graph.

    Attributes:
        opset: The opset of the standard operators; None if the file does not say.
        inputs: Element type of each input by name, without those that are initializers.
        elements: How many elements of each type the initializers hold.
        external_files: Names of the files beside it that hold initializers.
    """

    opset: int | None = None
    inputs: dict[str, str] = field(default_factory=dict)
    elements: dict[str, int] = field(default_factory=dict)
    external_files: tuple[str, ...] = ()

    @property
    def weight_type(self) -> str | None:
        """The element type of most of the floating-point weights, or None without any."""
        floats = {name: count for name, count in self.elements.items() if "float" in name}
        return max(floats, key=lambda name: floats[name]) if floats else None


def read_metadata(path: Path) -> dict[str, str]:
    """Return the key-value pairs in an ONNX file's ``metadata_props``.

    Large fields, the graph among them, are skipped and not read.

    Raises:
        BundleError: The file cannot be read, or is no protobuf message.
    """
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            entries = [
                data[start:end] for number, start, end in fields_of(data, 0, len(data)) if number == _MODEL_METADATA
            ]
        return dict(_entry(entry) for entry in entries)
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: not an ONNX file, or truncated; expected one written by vpdeploy export") from error
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from error


def append_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Add key-value pairs to an ONNX file's ``metadata_props`` without writing anything else of it again.

    The entries of a repeated field may stand anywhere in a protobuf message, so those that are added follow the graph
    and its weights. They are on the disk when this returns; a crash before that may leave the file without its last
    bytes, so it is for a file that is not published yet.

    Args:
        path: A whole ONNX file.
        metadata: What is added; keys that the file does not have yet.

    Raises:
        OSError: The file cannot be written.
    """
    fields = b"".join(
        _length_field(
            _MODEL_METADATA, _length_field(_ENTRY_KEY, key.encode()) + _length_field(_ENTRY_VALUE, text.encode())
        )
        for key, text in metadata.items()
    )
    with path.open("ab") as stream:
        stream.write(fields)
        stream.flush()
        os.fsync(stream.fileno())


def read_graph(path: Path) -> OnnxGraph:
    """Read an ONNX file; the bytes of its weights are skipped.

    Raises:
        BundleError: The file cannot be read, or is no protobuf message.
    """
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read_model(data)
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: not an ONNX file, or truncated; export it again") from error
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from error


def weights_bytes(path: Path, graph: OnnxGraph) -> tuple[int, int]:
    """Return the bytes of an ONNX file, and of the files beside it that belong to it.

    Raises:
        BundleError: A file beside it is missing.
    """
    external = 0
    for name in graph.external_files:
        try:
            external += (path.parent / name).stat().st_size
        except OSError as error:
            raise BundleError(
                f"{path.parent / name}: cannot be read: {error.strerror}; it holds weights of {path.name}, keep both "
                "in one folder"
            ) from error
    return path.stat().st_size, external


def _entry(data: bytes) -> tuple[str, str]:
    texts = {number: data[start:end].decode() for number, start, end in fields_of(data, 0, len(data))}
    return texts.get(_ENTRY_KEY, ""), texts.get(_ENTRY_VALUE, "")


def _length_field(number: int, content: bytes) -> bytes:
    """Encode a field of bytes: its tag, its length, and the bytes."""
    return _varint(number << 3 | _LENGTH) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    """Encode a number as protobuf does: seven bits in a byte, the lowest first; all but the last have the high bit."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def fields_of(data: bytes | mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, start and end of each field's bytes of the protobuf message in ``data[start:end]``.

    Raises:
        ValueError: A field has an unknown wire type or reaches beyond the end.
        IndexError: The message ends within a tag.
    """
    position = start
    while position < end:
        tag, position = varint_at(data, position)
        kind = tag & 7
        if kind == _VARINT:
            begin = position
            _, position = varint_at(data, position)
        elif kind == _LENGTH:
            length, begin = varint_at(data, position)
            position = begin + length
        elif kind in (_FIXED64, _FIXED32):
            begin, position = position, position + (8 if kind == _FIXED64 else 4)
        else:
            raise ValueError(f"wire type {kind}")
        if position > end or tag >> 3 == 0:
            raise ValueError("a field reaches beyond the end")
        yield tag >> 3, begin, position


def varint_at(data: bytes | mmap.mmap, position: int) -> tuple[int, int]:
    """Return a number and the position behind it.

    Raises:
        ValueError: It has more than 64 bits.
        IndexError: The data end within it.
    """
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _read_model(data: mmap.mmap) -> OnnxGraph:
    opset: int | None = None
    inputs: dict[str, str] = {}
    names: set[str] = set()
    elements: Counter[str] = Counter()
    external: dict[str, None] = {}
    for number, start, end in fields_of(data, 0, len(data)):
        if number == _MODEL_OPSET:
            domain, version = _read_opset(data, (start, end))
            opset = version if domain in _STANDARD_DOMAINS else opset
        elif number == _MODEL_GRAPH:
            for part, begin, stop in fields_of(data, start, end):
                if part == _GRAPH_INPUT:
                    name, kind = _read_input(data, (begin, stop))
                    inputs[name] = kind
                elif part == _GRAPH_INITIALIZER:
                    name, kind, count, file = _read_tensor(data, (begin, stop))
                    names.add(name)
                    elements[kind] += count
                    external.update({file: None} if file else {})
    return OnnxGraph(
        opset=opset,
        inputs={name: kind for name, kind in inputs.items() if name not in names},
        elements=dict(elements),
        external_files=tuple(external),
    )


def _read_opset(data: mmap.mmap, span: Span) -> tuple[str, int | None]:
    domain, version = "", None
    for number, start, end in fields_of(data, *span):
        if number == _OPSET_DOMAIN:
            domain = data[start:end].decode()
        elif number == _OPSET_VERSION:
            version = varint_at(data, start)[0]
    return domain, version


def _read_input(data: mmap.mmap, span: Span) -> tuple[str, str]:
    name, element = "", 0
    for number, start, end in fields_of(data, *span):
        if number == _VALUE_NAME:
            name = data[start:end].decode()
        elif number == _VALUE_TYPE:
            for tensor in _parts(data, (start, end), _TYPE_TENSOR):
                for kind in _parts(data, tensor, _TENSOR_ELEMENT):
                    element = varint_at(data, kind[0])[0]
    return name, _TYPES.get(element, "other")


def _read_tensor(data: mmap.mmap, span: Span) -> tuple[str, str, int, str]:
    """Return an initializer's name, element type, number of elements, and the file that holds it or ""."""
    name, kind, count, file = "", 0, 1, ""
    for number, start, end in fields_of(data, *span):
        if number == _TENSOR_NAME:
            name = data[start:end].decode()
        elif number == _TENSOR_TYPE:
            kind = varint_at(data, start)[0]
        elif number == _TENSOR_EXTERNAL:
            texts = {key: data[begin:stop].decode() for key, begin, stop in fields_of(data, start, end)}
            file = texts.get(_ENTRY_VALUE, "") if texts.get(_ENTRY_KEY) == "location" else file
            if "\0" in file:
                raise ValueError("a file name with a zero byte")
        elif number == _TENSOR_DIMS:
            # Sizes come one to a field, or several in one: either way they are numbers in a row.
            while start < end:
                size, start = varint_at(data, start)
                count *= size
                if count > _MOST_ELEMENTS:  # a negative size, too, reads as one beyond
                    raise ValueError("more elements than a tensor can have")
    return name, _TYPES.get(kind, "other"), count, file


def _parts(data: mmap.mmap, span: Span, wanted: int) -> Iterator[Span]:
    return ((start, end) for number, start, end in fields_of(data, *span) if number == wanted)
