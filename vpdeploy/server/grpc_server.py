"""The gRPC server: calls are admitted, read, answered and counted as HTTP requests are, in threads of their own.

gRPC holds a message until the whole of it has arrived, before anybody can count it. So a call takes a place before its
message is read, of which there are as many as messages fit half the budget; a stream keeps one, as a message may arrive
at any time. Every method, whatever it takes, is therefore a stream of requests to gRPC; on the wire there is no
difference.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import unquote

import grpc

from vpdeploy.errors import ShuttingDownError, SpecError
from vpdeploy.server.access import EVERYBODY, Grant
from vpdeploy.server.client_places import ClientPlaces
from vpdeploy.server.grpc_messages import HEALTH_SERVICE, SERVICE
from vpdeploy.server.grpc_methods import Call, Methods
from vpdeploy.server.service import Service
from vpdeploy.server.settings import ServerSettings
from vpdeploy.server.statuses import ClientGoneError, describe_error
from vpdeploy.server.tls import Certificate

_log = logging.getLogger(__name__)

_MAX_CALLS = 256
"""Calls under way; each has a thread while it is answered."""

_CLIENT_CALLS = _MAX_CALLS * 3 // 4
_ARRIVAL_TIMEOUTS = 3
"""How long the whole of a message may take to arrive, in ``body_timeout_s``."""

_CONTENDED_S = 2.0
"""How long it may take while others wait, and its client has many places: who stalls must not keep them for long."""

_LAST_S = 1.0
"""How long it may take once the server is to stop."""

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""The gRPC status of each HTTP status that an error has; INTERNAL for all others."""


class GrpcServer:
    """A gRPC server on an address of its own.

    Args:
        host: Where to listen.
        port: The port; 0 picks a free one.
        settings: What is accepted.

    Attributes:
        address: ``HOST:PORT``.

    Raises:
        SpecError: The address is not ours to use, or the certificate cannot be used.
    """

    def __init__(self, host: str, port: int, settings: ServerSettings) -> None:
        self._settings = settings
        self._threads = ThreadPoolExecutor(_MAX_CALLS, thread_name_prefix="vpdeploy-grpc")
        self._server = grpc.server(
            self._threads, options=_options(settings), maximum_concurrent_rpcs=_MAX_CALLS, compression=None
        )
        places = max(2, settings.max_buffered_bytes // (2 * settings.max_message_bytes))
        client_places = max(1, settings.client_bytes // (2 * settings.max_message_bytes))
        self._calls = ClientPlaces(total=_MAX_CALLS, per_client=_CLIENT_CALLS, what="calls under way")
        self._arrivals = ClientPlaces(total=places, per_client=client_places, what="messages on their way")
        self._streams = ClientPlaces(total=places, per_client=client_places, what="streams open")
        self._clock = _ArrivalClock(self._arrivals, _ARRIVAL_TIMEOUTS * settings.body_timeout_s)
        self._stopped: threading.Event | None = None
        authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if settings.certfile is None:
                bound = self._server.add_insecure_port(authority)
            else:
                certificate = Certificate(settings.certfile, settings.keyfile)
                bound = self._server.add_secure_port(authority, _credentials(certificate))
        except RuntimeError:
            raise SpecError(f"cannot listen on {authority} for gRPC; choose another --host or --grpc-port") from None
        self.address = f"{authority.rpartition(':')[0]}:{bound}"

    def start(self, service: Service) -> None:
        """Start to accept calls; to be called on the event loop of the service."""
        self._service = service
        self._methods = Methods(service, asyncio.get_running_loop())
        self._server.add_generic_rpc_handlers((_Router(self._methods, self._answer, self._stream),))
        self._clock.start()
        self._server.start()

    @property
    def calls(self) -> int:
        """How many calls are under way."""
        return self._calls.in_use

    def stop(self, grace_s: float) -> None:
        """Accept no more calls; those under way are cancelled after ``grace_s``. Returns at once.

        Called again, the shortest time counts.
        """
        self._stopped = self._server.stop(grace_s)
        self._clock.hurry()

    def join(self, timeout_s: float) -> bool:
        """Wait until all calls have ended, and tell whether they have."""
        ended = self._stopped is None or self._stopped.wait(timeout_s)
        self._clock.stop()
        self._threads.shutdown(wait=False, cancel_futures=True)
        return ended

    def _answer(self, name: str, requests: Iterator[bytes], context: grpc.ServicerContext) -> Any:
        """Answer a call with one message."""
        try:
            call = self._admit(name, context)
            with self._arrivals.taken(call.client, wait_s=self._settings.body_timeout_s, is_wanted=context.is_active):
                message = self._receive(requests, context, call.client)
            assert message is not None
            return self._methods.answer(name, call, message).SerializeToString()
        except Exception as error:
            _abort(context, error)

    def _stream(self, name: str, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[Any]:
        """Answer the messages of a stream one after the other."""
        try:
            call = self._admit(name, context)
            context.add_callback(self._streams.take(call.client))
            while (message := self._receive(requests, context)) is not None:
                for answer in self._methods.answer_stream(name, call, message):
                    yield answer.SerializeToString()
                del message
        except Exception as error:
            _abort(context, error)

    def _admit(self, name: str, context: grpc.ServicerContext) -> Call:
        """Find out who calls, before anything of the message is read."""
        client = _client_of(context.peer())
        give_back = self._calls.take(client)
        if not context.add_callback(give_back):  # the call has ended
            give_back()
            raise ClientGoneError("the client left before its request was complete")
        grant: Grant = EVERYBODY
        if name not in self._methods.open_to_all:
            given = next((value for key, value in context.invocation_metadata() if key == "authorization"), "")
            grant = self._service.access.grant(given.encode() if isinstance(given, str) else given)
        if self._stopped is not None:
            raise ShuttingDownError("the server is shutting down; send the request elsewhere")
        remaining = context.time_remaining()
        has_deadline = remaining is not None and remaining < _NO_DEADLINE_S
        return Call(
            client=client,
            grant=grant,
            expires_at=time.monotonic() + remaining if has_deadline else None,
            on_end=context.add_callback,
            is_active=context.is_active,
        )

    def _receive(
        self, requests: Iterator[bytes], context: grpc.ServicerContext, client: str | None = None
    ) -> bytes | None:
        """Return the next message; None at the end of them, unless it is the only one of a client's call."""
        self._clock.watch(context, client)
        try:
            message: bytes = next(requests)
            return message
        except StopIteration:
            if client is not None or not context.is_active():
                raise ClientGoneError("the client sent no request") from None
            return None
        except grpc.RpcError:
            raise ClientGoneError("the client left before its request was complete") from None
        finally:
            self._clock.forget(context)


_NO_DEADLINE_S = 1e9


class _Router(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Tells gRPC who answers a method."""

    def __init__(self, methods: Methods, answer: Callable[..., Any], stream: Callable[..., Any]) -> None:
        self._handlers: dict[str, grpc.RpcMethodHandler] = {}
        for name in methods.unary:
            self._handlers[_path(name)] = grpc.stream_unary_rpc_method_handler(_named(answer, name))
        for name in methods.streaming:
            self._handlers[_path(name)] = grpc.stream_stream_rpc_method_handler(_named(stream, name))

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """Return the handler of a call."""
        return self._handlers.get(details.method)


def _named(handler: Callable[..., Any], name: str) -> Callable[[Iterator[bytes], grpc.ServicerContext], Any]:
    def handle(requests: Iterator[bytes], context: grpc.ServicerContext) -> Any:
        return handler(name, requests, context)

    return handle


def _path(name: str) -> str:
    return f"/{HEALTH_SERVICE if name in ('Check', 'Watch') else SERVICE}/{name}"


class _ArrivalClock:
    """Ends calls whose message does not arrive, and at the end of the server those that await one; a thread looks."""

    def __init__(self, places: ClientPlaces, timeout_s: float) -> None:
        self._places = places
        self._timeout_s = timeout_s
        self._since: dict[grpc.ServicerContext, tuple[str | None, float]] = {}
        self._is_ending = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="vpdeploy-grpc-clock", daemon=True)

    def start(self) -> None:
        """Start to look, twice a second."""
        self._thread.start()

    def hurry(self) -> None:
        """Wait for no message any more but those that are about to arrive."""
        self._is_ending = True

    def stop(self) -> None:
        """Look no more."""
        self._ended.set()

    def watch(self, context: grpc.ServicerContext, client: str | None) -> None:
        """A message is awaited from now on: of a client's call, or the next of a stream, which takes its time."""
        self._since[context] = (client, time.monotonic())

    def forget(self, context: grpc.ServicerContext) -> None:
        """It is awaited no more."""
        self._since.pop(context, None)

    def _look(self) -> None:
        while not self._ended.wait(min(0.5, self._timeout_s / 2)):
            now = time.monotonic()
            for context, (client, since) in list(self._since.items()):
                if now - since > self._patience_s(client):
                    context.cancel()

    def _patience_s(self, client: str | None) -> float:
        if self._is_ending:
            return _LAST_S
        if client is None:
            return math.inf
        return min(self._timeout_s, _CONTENDED_S) if self._places.are_wanted_from(client) else self._timeout_s


def _options(settings: ServerSettings) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", 16 << 10),
        ("grpc.absolute_max_metadata_size", 32 << 10),
        ("grpc.max_concurrent_streams", _MAX_CALLS),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        ("grpc.server_handshake_timeout_ms", int(settings.header_timeout_s * 1000)),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.so_reuseport", 0),
        # A compressed message is inflated whole before anybody can look at it.
        ("grpc.compression_enabled_algorithms_bitset", 1),
    ]


def _credentials(certificate: Certificate) -> grpc.ServerCredentials:
    """Return credentials that follow the certificate's files."""
    used = certificate.pem

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal used
        certificate.refresh()
        if certificate.pem == used:
            return None
        used = certificate.pem
        return grpc.ssl_server_certificate_configuration([used])

    return grpc.dynamic_ssl_server_credentials(grpc.ssl_server_certificate_configuration([used]), renewed)


def _client_of(peer: str) -> str:
    """Return a client's address, as HTTP knows it."""
    kind, _, rest = peer.partition(":")
    return unquote(rest).rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else peer


def _abort(context: grpc.ServicerContext, error: Exception) -> None:
    """End a call with an error; this raises."""
    status, message = describe_error(error)
    del error
    context.abort(_CODES.get(status, grpc.StatusCode.INTERNAL), message)
