"""Archives that clients send: tar, tar.gz and zip, read as if each were made to do harm. Nothing is written."""

from __future__ import annotations

import io
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath

from vpdeploy.errors import InputError
from vpdeploy.server.bodies import decompress
from vpdeploy.server.budget import Reservation
from vpdeploy.server.statuses import TooLargeError

CARD_FILE = "task.json"

_MAX_MEMBERS = 256
_MAX_EXTENDED_BYTES = 2 << 10
"""Size of a tar file's extended header: Python before 3.11.10 reads long ones in quadratic time."""

_MAX_DIRECTORY_BYTES = 64 << 10
"""Size of a zip file's directory, which Python holds whole, at a kilobyte for each member."""

_STEP_BYTES = 1 << 20
_BLOCK = 512
_PLAIN_TYPES = (b"0", b"\0")
_EXTENDED_TYPES = (b"x", b"g", b"L", b"K")
_END_OF_DIRECTORY = struct.Struct("<4s4H2LH")


def read_archive(data: bytes, reservation: Reservation, *, max_bytes: int) -> dict[str, bytes]:
    """Return the files of an archive that lie beside its ``task.json``, by name.

    ``task.json`` lies at the archive's top, or in its only folder; what lies in other folders is left out.

    Args:
        data: The archive.
        reservation: Grows with what comes out, before it does.
        max_bytes: What may come out.

    Raises:
        InputError: It is no archive, is damaged, or holds what it should not: links, devices, names that lead out, a
            name twice, too many files, no ``task.json``.
        TooLargeError: More would come out.
        QueueFullError: The budget does not hold it now.
    """
    if data[:2] == b"\x1f\x8b":
        data = decompress(data, "gzip", max_bytes, reservation)
    members = _zip_members if data[:4] == b"PK\x03\x04" else _tar_members
    files: dict[PurePosixPath, bytes] = {}
    left = max_bytes
    for name, content in members(data, reservation, max_bytes):
        path = _safe_path(name)
        if not path.parts:
            raise InputError("the archive holds a file without a name")
        if path in files:
            raise InputError(f"the archive holds '{path}' twice")
        files[path] = content
        left -= len(content)
        if left < 0:
            raise TooLargeError(f"the archive holds more than the accepted {max_bytes} bytes")
    cards = [path for path in files if path.name == CARD_FILE and len(path.parts) <= 2]
    if len(cards) != 1:
        raise InputError(
            f"the archive should hold one {CARD_FILE}, at its top or in its only folder, found {len(cards)}; "
            "pack a run or a compiled prompt set"
        )
    folder = cards[0].parent
    return {path.name: content for path, content in files.items() if path.parent == folder}


def _safe_path(name: str) -> PurePosixPath:
    """Return a member's path, which does not lead out of where it would be unpacked."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or not name.isprintable() or "\\" in name:
        raise InputError("the archive holds a name that leads out of it, or is none")
    if len(name) > 255 or any(":" in part for part in path.parts):
        raise InputError("the archive holds a name that not every system can write")
    return path


def _tar_members(data: bytes, reservation: Reservation, max_bytes: int) -> Iterator[tuple[str, bytes]]:
    _check_headers(data)
    with _naming_damage(), tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        for member in archive:
            if member.isdir():
                _safe_path(member.name)
                continue
            if not member.isreg() or member.issparse():
                raise InputError("the archive holds something else than plain files and folders, such as a link")
            if member.offset_data + member.size > len(data):
                raise InputError("the archive is truncated")
            reservation.grow(member.size)
            yield member.name, data[member.offset_data : member.offset_data + member.size]


def _check_headers(data: bytes) -> None:
    """Look through a tar file's headers for what its reader should not be given."""
    if len(data) < _BLOCK:
        raise _no_archive()
    position = members = 0
    while position + _BLOCK <= len(data) and data[position] != 0:
        size, kind = _tar_number(data[position + 124 : position + 136]), data[position + 156 : position + 157]
        if kind in _EXTENDED_TYPES and size > _MAX_EXTENDED_BYTES:
            raise InputError("the archive has long extended headers; make it with: tar --format=ustar")
        if kind not in (*_PLAIN_TYPES, *_EXTENDED_TYPES, b"5"):
            raise InputError("the archive holds something else than plain files and folders, such as a link")
        members += 1
        if members > 2 * _MAX_MEMBERS:
            raise InputError(f"the archive holds more than {_MAX_MEMBERS} files")
        position += _BLOCK + -(-size // _BLOCK) * _BLOCK


def _tar_number(field: bytes) -> int:
    text = field.strip(b"\0 ")
    if not text.isdigit() or b"8" in text or b"9" in text:  # a size beyond octal digits does not fit a body
        raise _no_archive()
    return int(text, 8)


def _zip_members(data: bytes, reservation: Reservation, max_bytes: int) -> Iterator[tuple[str, bytes]]:
    _check_directory(data)
    with _naming_damage(), zipfile.ZipFile(io.BytesIO(data)) as archive:
        for member in archive.infolist():
            mode = member.external_attr >> 16
            if member.is_dir():
                _safe_path(member.filename)
                continue
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                raise InputError("the archive holds something else than plain files and folders, such as a link")
            if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise InputError("the archive is encrypted or packed unusually; pack it with zip's own deflate")
            content = io.BytesIO()
            with archive.open(member) as stream:
                while True:
                    reservation.grow(_STEP_BYTES)
                    piece = stream.read(_STEP_BYTES)
                    reservation.shrink(_STEP_BYTES - len(piece))
                    if not piece:
                        break
                    content.write(piece)
                    if content.tell() > max_bytes:
                        raise TooLargeError(f"the archive holds more than the accepted {max_bytes} bytes")
            yield member.filename, content.getvalue()


def _check_directory(data: bytes) -> None:
    """Look at a zip file's directory before its reader holds it."""
    end = data[-_END_OF_DIRECTORY.size :]
    if len(end) < _END_OF_DIRECTORY.size or end[:4] != b"PK\x05\x06" or data[-42:-38] == b"PK\x06\x07":
        raise InputError("the zip file is truncated, has a comment, or is of the form for very large files")
    _, _, _, here, count, size, _, _ = _END_OF_DIRECTORY.unpack(end)
    if count > _MAX_MEMBERS or here != count or size > _MAX_DIRECTORY_BYTES:
        raise InputError(f"the archive holds more than {_MAX_MEMBERS} files")


@contextmanager
def _naming_damage() -> Iterator[None]:
    """Say in one line what a reader makes of a damaged archive."""
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, ValueError, OverflowError) as error:
        raise InputError(f"the archive is damaged: {' '.join(str(error).split())[:100]}") from None
    except (OSError, NotImplementedError, struct.error, RuntimeError, IndexError):
        raise InputError("the archive is damaged") from None


def _no_archive() -> InputError:
    return InputError("the body is no archive; send a tar, tar.gz or zip file of a run or of a compiled prompt set")
