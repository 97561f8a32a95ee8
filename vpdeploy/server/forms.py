"""Forms (multipart/form-data, RFC 7578) that are in memory: cut at the boundaries, and only the files are copied."""

from __future__ import annotations

import io

from python_multipart.multipart import parse_options_header

from vpdeploy.errors import InputError

_MAX_FIELDS = 8
_MAX_HEAD_BYTES = 16 << 10
_WINDOW = 1 << 20
_MAX_BOUNDARY_BYTES = 200


def form_files(content_type: str, body: bytes, *, max_files: int) -> list[tuple[str, bytes]]:
    """Return the files of a form with their names, in order.

    Args:
        content_type: The request's Content-Type.
        body: The decompressed body.
        max_files: Files that the form may hold.

    Raises:
        InputError: The body is no form, or holds too much or no file.
    """
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if not 0 < len(boundary) <= _MAX_BOUNDARY_BYTES:
        raise InputError("Missing boundary in multipart.")
    delimiter = b"\r\n--" + boundary
    # What precedes the first boundary is to be ignored (RFC 2046, 5.1.1).
    begin = 0 if body.startswith(delimiter[2:]) else _find(body, delimiter, 0) + 2
    if begin == 1:
        raise _broken("its boundary is not in it")
    files: list[tuple[str, bytes]] = []
    fields = 0
    position = begin + len(delimiter) - 2
    while not body.startswith(b"--", position):
        # A part: the end of the boundary's line, headers, an empty line, content, and the next boundary.
        if not body.startswith(b"\r\n", position):
            raise _broken("a boundary is followed by something else")
        head_end = body.find(b"\r\n\r\n", position, position + _MAX_HEAD_BYTES)
        if head_end < 0:
            raise _broken(f"a part's headers do not end within {_MAX_HEAD_BYTES} bytes")
        end = _find(body, delimiter, head_end + 2)
        if end < 0:
            raise _broken("it is not closed by its boundary")
        name = _file_name(body[position + 2 : head_end])
        if name is None:
            fields += 1
        else:
            files.append((name, _cut(body, head_end + 4, end)))
        if len(files) > max_files:
            raise InputError(f"Too many files. Maximum number of files is {max_files}.")
        if fields > _MAX_FIELDS:
            raise InputError(f"Too many fields. Maximum number of fields is {_MAX_FIELDS}.")
        position = end + len(delimiter)
    if not files:
        raise InputError("the form holds no file; send images as files, e.g. curl -F image=@photo.jpg")
    return files


def _find(body: bytes, delimiter: bytes, start: int) -> int:
    """Find the next boundary window by window, so that other threads may run in between; -1 where there is none."""
    while start < len(body):
        found = body.find(delimiter, start, start + _WINDOW + len(delimiter) - 1)
        if found >= 0:
            return found
        start += _WINDOW
    return -1


def _cut(body: bytes, start: int, end: int) -> bytes:
    """Copy a part of a body window by window."""
    view, part = memoryview(body), io.BytesIO()
    for position in range(start, end, _WINDOW):
        part.write(view[position : min(position + _WINDOW, end)])
    return part.getvalue()


def _file_name(head: bytes) -> str | None:
    """Return the file's name from a part's headers; None where the part is no file."""
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-disposition":
            _, options = parse_options_header(value.strip())
            if b"name" not in options:
                break
            found = options.get(b"filename")
            return None if found is None else found.decode("utf-8", errors="replace")
    raise _broken("a part has no Content-Disposition with a name")


def _broken(reason: str) -> InputError:
    return InputError(f"the body is not a valid form: {reason}")
