"""Lanes, on each of which one batch at a time is run, and the pool that lends them to threads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from vpdeploy.backends.native.device import Device
from vpdeploy.backends.native.engine import NativeEngine
from vpdeploy.backends.native.memory import DeviceTable, Staging
from vpdeploy.backends.native.program import Program, bucket_for
from vpdeploy.errors import BackendError
from vpdeploy.format.layout import CLASS_AXIS, IMAGE, SLOT


class Lane:
    """Runs batches in order; several lanes overlap one batch's copies with another's computation.

    Args:
        device: The GPU.
        engine: Shared by all lanes.
        sizes: The batch sizes that are run, ascending.

    Raises:
        BackendError: The device cannot hold the intermediate results; nothing is left allocated.
    """

    def __init__(self, device: Device, engine: NativeEngine, sizes: tuple[int, ...]) -> None:
        self._device = device
        self._engine = engine
        self._sizes = sizes
        self._stream = device.create_stream()
        self._activations = 0
        try:
            if engine.activation_bytes:
                self._activations = device.allocate(engine.activation_bytes, "an execution context")
            self._context = engine.create_context(self._activations)
        except BaseException:
            self._release()
            raise
        self._programs: dict[int, Program] = {}
        self._staging: Staging | None = None
        self._table: DeviceTable | None = None
        self._classes = engine.classes

    @property
    def staging_bytes(self) -> int:
        """The bytes that the staging takes on the device; as many are page-locked on the host."""
        return 0 if self._staging is None else self._staging.size_bytes

    @property
    def programs(self) -> tuple[Program, ...]:
        """The programs, one for each batch size that was run so far."""
        return tuple(self._programs.values())

    def attach(self, table: DeviceTable) -> None:
        """Read from another table from the next run on.

        Raises:
            BackendError: A captured graph could not be dropped.
        """
        classes = table.table.sizes[CLASS_AXIS]
        if classes != self._classes:
            self._drop_staging()
        self._table, self._classes = table, classes
        self._forget_graphs()

    def run(self, images: npt.NDArray[np.generic], slots: npt.NDArray[np.int32] | None) -> npt.NDArray[np.float32]:
        """Run a batch of at most the largest size; see ``Backend.run``.

        Raises:
            BackendError: The GPU or the runtime failed.
        """
        self._device.activate()
        rows = bucket_for(len(images), self._sizes)
        staging = self._staging_for(rows)
        program = self._program(rows)

        # What is bound already is left alone, so a replayed graph finds its context as it was captured.
        shapes, addresses = self._bindings(rows, staging)
        program.context.bind(shapes, addresses)

        staging.fill(images, slots, rows)
        try:
            program.start(staging)
        finally:
            self._device.synchronize(self._stream)  # what was queued before a failure still reads the staging
        return staging.logits(len(images))

    def close(self) -> None:
        """Free everything; nothing may be under way."""
        self._device.activate()
        self._table = None
        with contextlib.ExitStack() as steps:  # last in, first out; all are tried, even on a GPU that fails
            steps.callback(self._release)
            steps.callback(self._drop_staging)
            steps.callback(self._close_contexts)
            steps.callback(self._forget_graphs)

    def _close_contexts(self) -> None:
        for program in self._programs.values():
            program.context.close()
        self._context.close()
        self._programs.clear()

    def _program(self, rows: int) -> Program:
        if rows not in self._programs:
            captures = not self._engine.captures_itself
            context = self._context
            if captures and self._programs:  # one context for each captured graph; they share the intermediate results
                context = self._engine.create_context(self._activations)
            self._programs[rows] = Program(self._device, context, rows=rows, stream=self._stream, captures=captures)
        return self._programs[rows]

    def _staging_for(self, rows: int) -> Staging:
        """Return buffers for a batch size; larger ones take the place of smaller ones, and graphs are captured anew."""
        if self._staging is None or self._staging.capacity < rows:
            self._drop_staging()
            self._staging = Staging(
                self._device,
                capacity=rows,
                image_shape=self._engine.image_shape,
                image_dtype=self._engine.image_dtype,
                classes=self._classes,
                with_slots=SLOT in self._engine.inputs,
            )
        return self._staging

    def _bindings(self, rows: int, staging: Staging) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
        shapes: dict[str, tuple[int, ...]] = {IMAGE: (rows, *self._engine.image_shape)}
        addresses = staging.addresses
        if self._table is not None:
            shapes |= {SLOT: (rows,), **self._table.shapes}
            addresses |= self._table.addresses
        return shapes, addresses

    def _drop_staging(self) -> None:
        self._forget_graphs()
        if self._staging is not None:
            staging, self._staging = self._staging, None
            staging.free()

    def _forget_graphs(self) -> None:
        for program in self._programs.values():
            program.forget()

    def _release(self) -> None:
        with contextlib.ExitStack() as steps:
            steps.callback(self._device.destroy_stream, self._stream)
            if self._activations:
                steps.callback(self._device.free, self._activations)


class LanePool:
    """Lends each lane to one thread at a time.

    Args:
        lanes: All lanes; each is free.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self.lanes = tuple(lanes)
        self._free = list(lanes)
        self._wanted: list[Lane] = []
        self._closed = False
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def any(self) -> Iterator[Lane]:
        """Lend the free lane that was used last; wait for one if there is none.

        Raises:
            BackendError: The pool was closed.
        """
        with self._changed:
            while not self._closed and not self._available():
                self._changed.wait()
            self.check_open()
            lane = self._available()[-1]
            self._free.remove(lane)
        try:
            yield lane
        finally:
            self._give_back(lane)

    @contextlib.contextmanager
    def this(self, lane: Lane) -> Iterator[Lane]:
        """Lend one lane, ahead of everyone who waits for any."""
        with self._changed:
            self._wanted.append(lane)
            while lane not in self._free:
                self._changed.wait()
            self._wanted.remove(lane)
            self._free.remove(lane)
        try:
            yield lane
        finally:
            self._give_back(lane)

    def check_open(self) -> None:
        """Raise BackendError if the pool was closed."""
        if self._closed:
            raise BackendError("the session is closed; load the bundle again")

    def close(self) -> bool:
        """Lend no lane to ``any`` from now on; return whether this was the first call."""
        with self._changed:
            first, self._closed = not self._closed, True
            self._changed.notify_all()
        return first

    def _available(self) -> list[Lane]:
        return [lane for lane in self._free if lane not in self._wanted]

    def _give_back(self, lane: Lane) -> None:
        with self._changed:
            self._free.append(lane)
            self._changed.notify_all()
