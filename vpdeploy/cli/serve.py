"""``vpdeploy serve``: answer requests of all tasks from one engine."""

from __future__ import annotations

import ipaddress
import logging
import os
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vpdeploy.backends import AUTO
from vpdeploy.cli import exits
from vpdeploy.cli.config import ConfigOption
from vpdeploy.cli.runtimes import RuntimeOption
from vpdeploy.cli.sizes import parse_batch_size, parse_size
from vpdeploy.cli.threads import Threads
from vpdeploy.errors import SpecError
from vpdeploy.image import MAX_PIXELS

if TYPE_CHECKING:
    from vpdeploy.serving.batcher import BatchSettings
    from vpdeploy.session.session import Session


class LogFormat(str, Enum):
    """How log lines are written."""

    TEXT = "text"
    JSON = "json"


def serve(
    path: Annotated[Path, typer.Argument(help="A bundle, or one task's ONNX file, from vpdeploy export.")],
    config: ConfigOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")] = 8000,
    grpc_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port to listen on for gRPC too; 0 picks a free one.")
    ] = None,
    runtime: RuntimeOption = AUTO,
    threads: Threads = None,
    max_batch_size: Annotated[
        int | None,
        typer.Option(
            parser=parse_batch_size,
            metavar="N|auto",
            show_default="auto",
            help="Images in one batch at most; auto measures, once for each machine.",
        ),
    ] = None,
    max_delay_ms: Annotated[
        float, typer.Option(min=0, max=60000, help="How long an image waits for others to share a batch.")
    ] = 2.0,
    max_queue_size: Annotated[int, typer.Option(min=1, help="Images that may wait; more are refused.")] = 1024,
    deadline_ms: Annotated[
        float | None, typer.Option(help="Give up requests that take longer and name no deadline themselves.")
    ] = None,
    max_body_bytes: Annotated[
        int,
        typer.Option(
            parser=parse_size,
            metavar="SIZE",
            show_default="64MiB",
            help="Size of one request's body, also decompressed.",
        ),
    ] = 64 << 20,
    max_buffered_bytes: Annotated[
        int,
        typer.Option(
            parser=parse_size,
            metavar="SIZE",
            show_default="512MiB",
            help="What all requests together may hold in memory.",
        ),
    ] = 512 << 20,
    max_client_bytes: Annotated[
        int | None,
        typer.Option(
            parser=parse_size, metavar="SIZE", help="What one client (address) may hold of it; default: three quarters."
        ),
    ] = None,
    max_message_bytes: Annotated[
        int,
        typer.Option(parser=parse_size, metavar="SIZE", show_default="16MiB", help="Size of one message over gRPC."),
    ] = 16 << 20,
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels that one encoded image may have.")] = MAX_PIXELS,
    max_images: Annotated[int, typer.Option(min=1, help="Images that one request may hold.")] = 128,
    token: Annotated[
        str | None,
        typer.Option(envvar="VPDEPLOY_TOKEN", help="Bearer token that every request but health must carry."),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(help="TOML file of several tokens with scopes and tasks; read again when it changes."),
    ] = None,
    admin: Annotated[
        bool, typer.Option("--admin", help="Let clients publish, withdraw and roll back tasks, with a token for it.")
    ] = False,
    admin_token: Annotated[
        str | None, typer.Option(envvar="VPDEPLOY_ADMIN_TOKEN", help="Bearer token that is good for everything.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="The backbone's weights file, for runs that clients publish.")
    ] = None,
    certfile: Annotated[
        Path | None, typer.Option(help="Certificate for TLS, as PEM; read again when it changes.")
    ] = None,
    keyfile: Annotated[Path | None, typer.Option(help="The certificate's private key, as PEM.")] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Host name that requests may use; repeat it, '*.NAME' for all below, '*' for all. Default: names of "
            "this machine if only it can connect, else all.",
        ),
    ] = None,
    stall_s: Annotated[
        float, typer.Option(help="Give up, and end, when work has stood still for so many seconds.")
    ] = 60.0,
    lame_duck_s: Annotated[
        float, typer.Option(min=0, help="Seconds of listening on, not ready any more, after the signal to stop.")
    ] = 2.0,
    drain_s: Annotated[float, typer.Option(min=0, help="Seconds that accepted requests may take from then on.")] = 20.0,
    log_format: Annotated[LogFormat, typer.Option(help="Format of the logs on stderr.")] = LogFormat.TEXT,
    access_log: Annotated[bool, typer.Option("--access-log", help="Log every HTTP request.")] = False,
    traces: Annotated[
        bool | None,
        typer.Option(
            "--traces/--no-traces",
            show_default="if OTEL_* asks",
            help="Send spans of requests by OpenTelemetry, as its variables say.",
        ),
    ] = None,
    warmup: Annotated[
        bool, typer.Option(help="Run batches of every size, for 10 s at most, before the first request is accepted.")
    ] = True,
    watch: Annotated[bool, typer.Option(help="Serve tasks that are published while running.")] = True,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse to start where a task is damaged; otherwise the others are served.")
    ] = False,
) -> None:
    """Serve every task of PATH: Open Inference Protocol v2 over HTTP and gRPC, plain image uploads, and metrics."""
    from vpdeploy.format.bundle import is_bundle
    from vpdeploy.server.app import create_app
    from vpdeploy.server.logs import configure_logs
    from vpdeploy.server.run import address_of, bind_socket, run_server
    from vpdeploy.server.service import check_administration
    from vpdeploy.server.settings import ServerSettings
    from vpdeploy.server.tls import Certificate
    from vpdeploy.server.tokens import read_access
    from vpdeploy.server.tracing import Tracing, is_asked_for
    from vpdeploy.serving.batcher import BatchSettings
    from vpdeploy.session.session import load
    from vpdeploy.session.warmup import warm_up

    # Click takes an empty variable for none, which would serve openly what was meant to be guarded.
    for variable, given in (("VPDEPLOY_TOKEN", token), ("VPDEPLOY_ADMIN_TOKEN", admin_token)):
        if given is None and os.environ.get(variable) == "":
            raise SpecError(f"{variable} is empty; set it to the token, or unset it to serve without one")
    if admin and not is_bundle(path):
        raise SpecError(
            f"{path}: --admin changes the tasks of a bundle, and this is none; serve a bundle or leave it out"
        )
    configure_logs(log_format.value)
    settings = ServerSettings(
        batching=BatchSettings(
            max_batch_size=max_batch_size or 1,
            max_delay_ms=max_delay_ms,
            max_queue_size=max_queue_size,
            deadline_ms=deadline_ms,
        ),
        token=token,
        admin_token=admin_token,
        token_file=token_file,
        administered=path if admin else None,
        weights=weights,
        certfile=certfile,
        keyfile=keyfile,
        allowed_hosts=_allowed_hosts(allowed_host, host),
        max_body_bytes=max_body_bytes,
        max_buffered_bytes=max_buffered_bytes,
        max_client_bytes=max_client_bytes,
        max_message_bytes=max_message_bytes,
        max_pixels=max_pixels,
        max_images=max_images,
        access_log=access_log,
        stall_s=stall_s,
        lame_duck_s=lame_duck_s,
        drain_s=drain_s,
        watch=path if watch and is_bundle(path) else None,
    )
    tracing = Tracing() if traces or (traces is None and is_asked_for()) else None
    # What is wrong with a file is said before the model is loaded.
    access = read_access(token=token, admin_token=admin_token, token_file=token_file)
    check_administration(settings, access)
    certificate = None if certfile is None else Certificate(certfile, keyfile)
    if access.is_open and not _is_loopback(host):
        typer.echo(
            f"WARNING: listening on {host} without a token: everyone who can reach this machine can use it. "
            "Set VPDEPLOY_TOKEN, --token or --token-file, or listen on 127.0.0.1.",
            err=True,
        )
    grpc_server = None
    if grpc_port is not None:
        from vpdeploy.server.grpc_server import GrpcServer

        grpc_server = GrpcServer(host, grpc_port, settings)
    with bind_socket(host, port) as listener, load(path, runtime=runtime, threads=threads, strict=strict) as session:
        chosen = session.describe().runtime
        logging.getLogger(__name__).info("runtime %s: %s", chosen.name, chosen.reason)
        if max_batch_size is None:
            settings = replace(settings, batching=_measured(session, settings.batching))
        logging.getLogger(__name__).info(
            "batches of at most %d images: %s", settings.batching.max_batch_size, settings.batching.size_reason
        )
        if warmup and (warmed := warm_up(session, max_batch_size=settings.batching.max_batch_size)):
            logging.getLogger(__name__).info("warmed up: %s", warmed)
        address = address_of(listener)

        def announce() -> None:
            scheme = "http" if certificate is None else "https"
            also = "" if grpc_server is None else f" and grpc://{grpc_server.address}"
            print(
                f"serving {len(session.tasks)} tasks on {scheme}://{address}{also} (runtime {chosen.name})", flush=True
            )

        app = create_app(session, settings, grpc_server=grpc_server, tracing=tracing)
        stopped_when_told = run_server(app, listener, on_listening=announce)
        if tracing is not None:
            tracing.close()
    if not stopped_when_told:
        raise typer.Exit(exits.KNOWN_ERROR)


def _allowed_hosts(asked: list[str] | None, host: str) -> tuple[str, ...] | None:
    """Return the names that the server answers to; None for all."""
    from vpdeploy.server.hosts import LOOPBACK_HOSTS

    if asked:
        return tuple(asked)
    return (*LOOPBACK_HOSTS, f"[{host}]" if ":" in host else host) if _is_loopback(host) else None


def _measured(session: Session, batching: BatchSettings) -> BatchSettings:
    """Return the settings with the batch size that is best here."""
    from vpdeploy.session.batch_size import choose_batch_size

    chosen = choose_batch_size(session)
    return replace(batching, max_batch_size=chosen.size, size_reason=chosen.reason)


def _is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
