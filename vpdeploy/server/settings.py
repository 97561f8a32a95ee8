"""What a server accepts, and how much of it at a time."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from vpdeploy.errors import SpecError
from vpdeploy.image import MAX_PIXELS
from vpdeploy.server.tokens import check_token
from vpdeploy.serving.batcher import BatchSettings

_MIB = 1 << 20


def _default_decode_threads() -> int:
    return min(os.cpu_count() or 1, 16)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Limits and options of one server.

    Attributes:
        batching: When a batch forms, and how much may wait for it.
        token: A token that requests may carry, as ``Authorization: Bearer TOKEN``; it is good for all but the
            administration. As soon as there is any token, every request but those for health must carry one.
        admin_token: A token that is good for everything.
        token_file: A file of more tokens, read again when it changes (see ``vpdeploy.server.tokens``).
        administered: The bundle folder that clients may change, with a token of the scope ``admin``; None for none.
        weights: The backbone's weights for runs that are sent without them; None for those that timm has here.
        certfile: The certificate, as PEM; with one, the server speaks TLS only. Read again when it changes.
        keyfile: Its private key, as PEM; None where the certificate's file holds it.
        allowed_hosts: The names that the server answers to; None for all.
        max_body_bytes: Size that one request's body may have, as sent and also after decompression.
        max_buffered_bytes: What all requests together may make the server hold: bodies as sent and inflated, and
            pixels while they are decoded.
        max_client_bytes: What the requests of one client, by its address, may hold of that; None for three quarters,
            and for room for two of the largest bodies. Behind a proxy all clients have one address.
        max_message_bytes: Size that one gRPC message may have. gRPC holds messages before they can be counted, so there
            may be as many on their way as fit half of ``max_buffered_bytes``, and as many streams open.
        max_json_bytes: Size that the JSON part of one request may have.
        max_json_values: Values, lists and objects that it may hold: parsing keeps all else waiting, so it must be
            short.
        max_images: Images that one request may hold, and rows that a fan-out may ask for.
        max_pixels: Pixels that one encoded image may have.
        decode_threads: Threads that inflate, parse and decode for one task at a time.
        max_connections: Connections that may be open; more are closed at once.
        header_timeout_s: How long the head of a request may take to arrive, in s, and a connection may be idle.
        body_timeout_s: How long a body may take to arrive, in s, beside a second for each ``min_body_bytes_per_s`` of
            it; and how long a client may take none of its answer.
        min_body_bytes_per_s: The slowest upload that is waited for.
        access_log: Whether each HTTP request is logged.
        stall_s: How long work may stand still in the runtime, or in the threads that decode, before the server gives
            up, in s; after half of it, it is not ready.
        lame_duck_s: How long the server goes on accepting after it was told to stop and ended readiness, in s, so that
            whoever sends it requests can notice.
        drain_s: How long requests that were accepted may take from then on, in s.
        watch: A bundle folder whose manifest is watched for new tasks, or None.
        watch_interval_s: Time between two looks at the manifest, in s.

    Raises:
        SpecError: A value is out of range.
    """

    batching: BatchSettings = field(default_factory=BatchSettings)
    token: str | None = field(default=None, repr=False)
    admin_token: str | None = field(default=None, repr=False)
    token_file: Path | None = None
    administered: Path | None = None
    weights: Path | None = None
    certfile: Path | None = None
    keyfile: Path | None = None
    allowed_hosts: tuple[str, ...] | None = None
    max_body_bytes: int = 64 * _MIB
    max_buffered_bytes: int = 512 * _MIB
    max_client_bytes: int | None = None
    max_message_bytes: int = 16 * _MIB
    max_json_bytes: int = 8 * _MIB
    max_json_values: int = 320_000
    max_images: int = 128
    max_pixels: int = MAX_PIXELS
    decode_threads: int = field(default_factory=_default_decode_threads)
    max_connections: int = 1024
    header_timeout_s: float = 10.0
    body_timeout_s: float = 10.0
    min_body_bytes_per_s: int = 16 * 1024
    access_log: bool = False
    stall_s: float = 60.0
    lame_duck_s: float = 2.0
    drain_s: float = 20.0
    watch: Path | None = None
    watch_interval_s: float = 2.0

    def __post_init__(self) -> None:
        sizes = {
            "max_body_bytes": self.max_body_bytes,
            "max_buffered_bytes": self.max_buffered_bytes,
            "max_client_bytes": self.client_bytes,
            "max_message_bytes": self.max_message_bytes,
            "max_json_bytes": self.max_json_bytes,
            "max_json_values": self.max_json_values,
            "max_images": self.max_images,
            "max_pixels": self.max_pixels,
            "decode_threads": self.decode_threads,
            "max_connections": self.max_connections,
            "min_body_bytes_per_s": self.min_body_bytes_per_s,
        }
        for name, value in sizes.items():
            if value < 1:
                raise SpecError(f"{name} should be at least 1, found {value}")
        for name, seconds in (
            ("watch_interval_s", self.watch_interval_s),
            ("header_timeout_s", self.header_timeout_s),
            ("body_timeout_s", self.body_timeout_s),
            ("stall_s", self.stall_s),
        ):
            if not seconds > 0:
                raise SpecError(f"{name} should be more than 0, found {seconds}")
        if self.keyfile is not None and self.certfile is None:
            raise SpecError("keyfile is the key of a certificate; give certfile too")
        for token in (self.token, self.admin_token):
            if token is not None:
                check_token(token)
        if not (self.lame_duck_s >= 0 and self.drain_s >= 0):
            raise SpecError(
                f"lame_duck_s and drain_s should be at least 0, found {self.lame_duck_s} and {self.drain_s}"
            )

    @property
    def client_bytes(self) -> int:
        """What the requests of one client may hold."""
        if self.max_client_bytes is not None:
            return self.max_client_bytes
        return min(self.max_buffered_bytes, max(self.max_buffered_bytes * 3 // 4, 2 * self.max_body_bytes))
