"""Real servers on real sockets, and sessions that stop where a test wants them to."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vpdeploy import load
from vpdeploy.server.app import create_app
from vpdeploy.server.run import Server, address_of, bind_socket
from vpdeploy.server.service import Service
from vpdeploy.server.settings import ServerSettings
from vpdeploy.session.session import Session

TIMEOUT_S = 30


class Gate:
    """A session whose runs wait for permits."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._running = threading.Semaphore(0)
        self._permits = threading.Semaphore(0)
        self.batch_sizes: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, images: np.ndarray, slots: np.ndarray) -> np.ndarray:
        self.batch_sizes.append(len(images))
        self._running.release()
        assert self._permits.acquire(timeout=TIMEOUT_S)
        return self._session.run(images, slots)

    def wait_until_running(self) -> None:
        assert self._running.acquire(timeout=TIMEOUT_S)

    def permit(self, batches: int = 1) -> None:
        self._permits.release(batches)


class RunningServer:
    """A server in a thread of its own."""

    def __init__(self, session: Any, settings: ServerSettings | None, *, with_grpc: bool, **options: Any) -> None:
        listening = threading.Event()
        listener = bind_socket("127.0.0.1", 0)
        self.grpc_server = None
        if with_grpc:
            from vpdeploy.server.grpc_server import GrpcServer

            self.grpc_server = GrpcServer("127.0.0.1", 0, settings or ServerSettings())
            self.grpc_address = self.grpc_server.address
        self.app = app = create_app(session, settings, grpc_server=self.grpc_server, **options)
        self.address = address_of(listener)
        self.url = f"http://{self.address}"
        self.session = session
        self.service: Service = app.state.service

        def announce() -> None:
            self.loop = asyncio.get_running_loop()
            listening.set()

        self.server = Server(app, on_listening=announce)
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]})
        self._thread.start()
        assert listening.wait(TIMEOUT_S)

    def metric(self, name: str, **labels: str) -> float:
        """Read one value that Prometheus would see; 0 if there is none yet."""
        return self.service.metrics.registry.get_sample_value(name, labels) or 0.0

    def stop(self) -> None:
        """Ask the server to stop, as a signal would."""
        self.server.stop()

    def join(self) -> None:
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread or process is about to do."""
    nobody = threading.Event()
    for _ in range(TIMEOUT_S * 200):
        if condition():
            return
        nobody.wait(0.005)
    raise AssertionError("it did not happen")


@contextlib.contextmanager
def serving(
    session: Any, settings: ServerSettings | None = None, *, with_grpc: bool = False, **options: Any
) -> Iterator[RunningServer]:
    """Serve a session until the block ends."""
    server = RunningServer(session, settings, with_grpc=with_grpc, **options)
    try:
        yield server
    finally:
        server.stop()
        server.join()


@contextlib.contextmanager
def serving_gated(
    bundle: Path, settings: ServerSettings | None = None, *, with_grpc: bool = False
) -> Iterator[tuple[RunningServer, Gate]]:
    """Serve a bundle whose batches wait for permits; all are permitted when the block ends."""
    with load(bundle) as session:
        gate = Gate(session)
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(serving(gate, settings, with_grpc=with_grpc))
            stack.callback(gate.permit, 10_000)
            yield server, gate
