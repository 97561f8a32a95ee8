"""The file beside an ONNX file that holds its weights where one file cannot: ``X.onnx`` and ``X.DIGEST.data``.

The ONNX file names the data file in its metadata, with size and sha256. So the sha256 of the small file stands for
both, and two versions of a graph never share a data file's name.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpdeploy.errors import BundleCorruptError, BundleError
from vpdeploy.files import replacing_file, sha256_of_file
from vpdeploy.format.document import Document, to_json
from vpdeploy.format.onnxfile import read_metadata

METADATA_KEY = "vpdeploy.data"

_NAME = re.compile(r"[^/\\:\x00-\x1f]{1,200}\.data")


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """What an ONNX file says of its data file.

    Attributes:
        name: The file's name; it lies in the ONNX file's folder.
        sha256: sha256 of the file's bytes.
        size_bytes: The file's size, in bytes.
    """

    name: str
    sha256: str
    size_bytes: int

    def to_fields(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"file": self.name, "sha256": self.sha256, "size_bytes": self.size_bytes}

    @classmethod
    def from_document(cls, document: Document) -> DataFile:
        """Read the JSON form.

        Raises:
            BundleCorruptError: A field is missing, of another type, or no name of a data file.
        """
        name = document.take("file", str)
        if not _NAME.fullmatch(name):
            raise BundleCorruptError(f"{document.source}: '{name}' is not the name of a data file beside the graph")
        return cls(name=name, sha256=document.take("sha256", str), size_bytes=document.take("size_bytes", int))

    def to_metadata(self) -> dict[str, str]:
        """Return the key-value pair to store in the ONNX file's ``metadata_props``."""
        return {METADATA_KEY: to_json(self.to_fields())}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], *, source: str) -> DataFile | None:
        """Read the key-value pairs of an ONNX file; None where it holds its weights itself.

        Raises:
            BundleCorruptError: The metadata is damaged.
        """
        if METADATA_KEY not in metadata:
            return None
        return cls.from_document(Document.parse(metadata[METADATA_KEY], source=f"{source}: data file"))

    def verify(self, folder: Path) -> None:
        """Compare the file in ``folder`` with what is said of it.

        Raises:
            BundleCorruptError: It is missing, truncated, or holds other bytes; the message names it.
        """
        path = folder / self.name
        if not path.is_file():
            raise BundleCorruptError(f"{path}: the graph's data file is missing; restore it or export again")
        if (found := path.stat().st_size) != self.size_bytes:
            raise BundleCorruptError(
                f"{path}: expected {self.size_bytes} bytes, found {found}; restore it or export again"
            )
        try:
            digest = sha256_of_file(path)
        except OSError as error:
            raise BundleCorruptError(f"{path}: cannot be read: {error.strerror}; export again") from error
        if digest != self.sha256:
            raise BundleCorruptError(f"{path}: contents do not match the sha256 the graph gives; export again")


def data_file_of(graph: Path) -> DataFile | None:
    """Return what an ONNX file says of its data file; None where it has none.

    Raises:
        BundleError: The file cannot be read, or is no ONNX file.
        BundleCorruptError: The metadata is damaged.
    """
    return DataFile.from_metadata(read_metadata(graph), source=str(graph))


def graph_size_bytes(graph: Path) -> int:
    """Return the size of an ONNX file and its data file.

    Raises:
        BundleError: The file cannot be read, or is no ONNX file.
    """
    data = data_file_of(graph)
    return graph.stat().st_size + (0 if data is None else data.size_bytes)


def move_data(data: DataFile, source: Path, target: Path) -> None:
    """Move a data file from folder ``source`` to folder ``target``, whole or not at all.

    Raises:
        OSError: The target folder cannot be written.
    """
    with replacing_file(target / data.name) as temporary:
        shutil.move(source / data.name, temporary)


def move_graph(staged: Path, target: Path) -> None:
    """Put a staged ONNX file and its data file in the place of ``target``.

    The data file comes first, the small file that names it then takes effect by one rename, and last the replaced
    graph's data file goes. What fails halfway leaves the old graph and its data file.

    Raises:
        BundleError: ``staged`` is no ONNX file.
        OSError: The folder cannot be written.
    """
    data, replaced = data_file_of(staged), None
    with contextlib.suppress(BundleError):  # a foreign or missing file that is replaced has no data file of ours
        replaced = data_file_of(target)
    is_new = data is not None and not (target.parent / data.name).exists()
    try:
        if data is not None:
            move_data(data, staged.parent, target.parent)
        with replacing_file(target) as temporary:
            shutil.move(staged, temporary)
    except BaseException:
        if data is not None and is_new:
            (target.parent / data.name).unlink(missing_ok=True)
        raise
    # A copy under another name still reads the data file of the graph that it was copied from.
    is_own = replaced is not None and replaced.name.startswith(f"{target.stem}.")
    if replaced is not None and is_own and (data is None or data.name != replaced.name):
        (target.parent / replaced.name).unlink(missing_ok=True)
