"""What a server accepts, and how much of it at a time."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from vpdeploy.errors import SpecError
from vpdeploy.image import MAX_PIXELS
from vpdeploy.serving.batcher import BatchSettings

_MIB = 1 << 20


def _default_decode_threads() -> int:
    return min(os.cpu_count() or 1, 16)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Limits and options of one server.

    Attributes:
        batching: When a batch forms, and how much may wait for it.
        token: The token that every request but those for health must carry, as ``Authorization: Bearer TOKEN``; None
            asks nobody for one.
        max_body_bytes: Size that one request's body may have, as sent and also after decompression.
        max_buffered_bytes: Size that all request bodies together may have while they are held.
        max_json_bytes: Size that the JSON part of one request may have; it is parsed on the event loop.
        max_images: Images that one request may hold, and rows that a fan-out may ask for.
        max_pixels: Pixels that one encoded image may have.
        decode_threads: Threads that decode images.
        watch: A bundle folder whose manifest is watched for new tasks, or None.
        watch_interval_s: Time between two looks at the manifest, in s.

    Raises:
        SpecError: A value is out of range.
    """

    batching: BatchSettings = field(default_factory=BatchSettings)
    token: str | None = field(default=None, repr=False)
    max_body_bytes: int = 64 * _MIB
    max_buffered_bytes: int = 512 * _MIB
    max_json_bytes: int = 8 * _MIB
    max_images: int = 128
    max_pixels: int = MAX_PIXELS
    decode_threads: int = field(default_factory=_default_decode_threads)
    watch: Path | None = None
    watch_interval_s: float = 2.0

    def __post_init__(self) -> None:
        sizes = {
            "max_body_bytes": self.max_body_bytes,
            "max_buffered_bytes": self.max_buffered_bytes,
            "max_json_bytes": self.max_json_bytes,
            "max_images": self.max_images,
            "max_pixels": self.max_pixels,
            "decode_threads": self.decode_threads,
        }
        for name, value in sizes.items():
            if value < 1:
                raise SpecError(f"{name} should be at least 1, found {value}")
        if not self.watch_interval_s > 0:
            raise SpecError(f"watch_interval_s should be more than 0, found {self.watch_interval_s}")
        if self.token is not None and not (self.token and self.token.isascii() and self.token.isprintable()):
            raise SpecError("the token should be printable ASCII characters, and at least one of them")
