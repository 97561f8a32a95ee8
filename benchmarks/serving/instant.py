"""A server whose session answers at once, so that what is left is the front end: ``python instant.py [PORT]``.

It is run as a file, so that ``PYTHONPATH`` decides which checkout serves. Prints its address when it listens.
"""

from __future__ import annotations

import sys

import numpy as np

from vpdeploy.backends.description import RuntimeDescription
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy.format.task import BackboneId, TaskCard
from vpdeploy.server.app import create_app
from vpdeploy.server.run import address_of, bind_socket, run_server
from vpdeploy.server.settings import ServerSettings
from vpdeploy.session.session import SessionDescription, SyncReport
from vpdeploy.session.slots import TaskDirectory

CLASSES = 10
SIDE = 224
TASKS = ("first", "second", "third")


class InstantSession:
    """A session without a graph."""

    def __init__(self) -> None:
        self.preprocessing = Preprocessing(image_size=SIDE, mean=(0.5,) * 3, std=(0.5,) * 3)
        self.failures: dict[str, str] = {}
        self._directory = TaskDirectory(len(TASKS))
        backbone = BackboneId(name="none", sha256="0" * 64, depth=1, width=3, heads=1, patch_size=16)
        for name in TASKS:
            card = TaskCard(
                name=name,
                labels=tuple(f"class {index}" for index in range(CLASSES)),
                method="e2vpt",
                backbone=backbone,
                preprocessing=self.preprocessing,
            )
            self._directory.admit(card, self._directory.reserve(), 1)
        self._row = np.linspace(0, 1, CLASSES, dtype=np.float32)

    @property
    def tasks(self) -> tuple[str, ...]:
        return self._directory.tasks

    def lease(self, task: str) -> object:
        return self._directory.lease(task)

    def run(self, images: np.ndarray, slots: np.ndarray) -> np.ndarray:
        return np.tile(self._row, (len(images), 1))

    def describe(self) -> SessionDescription:
        runtime = RuntimeDescription(name="instant", version="1", reason="asked for", threads=None)
        return SessionDescription(
            runtime=runtime, precision="fp32", image_size=SIDE, slots=len(TASKS), slot_bytes=0, table_bytes=0
        )

    def sync(self) -> SyncReport:
        return SyncReport()


def main() -> None:
    with bind_socket("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 0) as listener:
        app = create_app(InstantSession(), ServerSettings())
        address = address_of(listener)
        run_server(app, listener, on_listening=lambda: print(address, flush=True))


if __name__ == "__main__":
    main()
