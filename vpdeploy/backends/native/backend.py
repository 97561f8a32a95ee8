"""The native runner: one engine, one table on the device, and several lanes that run batches side by side."""

from __future__ import annotations

import contextlib
import threading

import numpy as np
import numpy.typing as npt

from vpdeploy.backends.checks import check_batch
from vpdeploy.backends.description import DeviceMemory, LoadedEngine, RuntimeDescription
from vpdeploy.backends.native.cuda import CudaDevice, has_bindings
from vpdeploy.backends.native.device import Device
from vpdeploy.backends.native.engine import NativeEngine
from vpdeploy.backends.native.lane import Lane, LanePool
from vpdeploy.backends.native.memory import DeviceTable
from vpdeploy.backends.native.program import bucket_sizes
from vpdeploy.backends.native.runtime_cache import RuntimeCache
from vpdeploy.engines.profile import present_sizes
from vpdeploy.engines.store import build_command, engine_obstacle, find_engine, verify_engine
from vpdeploy.engines.toolkit import TOOLKITS, load_toolkit
from vpdeploy.errors import BackendError, MissingExtraError
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.layout import SLOT, SLOT_AXIS
from vpdeploy.machine import Gpu, find_gpu, gpu_obstacle
from vpdeploy.table import Table

LANES = 2
"""Execution contexts side by side: one batch is copied while another is computed; more only share the GPU."""


class NativeBackend:
    """See ``Backend``.

    Args:
        device: The GPU; owned from here on, as is the engine.
        engine: The engine, loaded on that GPU.
        gpu: What the driver says of the GPU.
        reason: Why this runtime was chosen.
        cache: The cache of what TensorRT-RTX compiles at run time; None for TensorRT.
        lanes: How many batches run side by side.

    Raises:
        BackendError: The device cannot hold the lanes; nothing is left allocated.
    """

    def __init__(
        self,
        device: Device,
        engine: NativeEngine,
        *,
        gpu: Gpu,
        reason: str,
        cache: RuntimeCache | None = None,
        lanes: int = LANES,
    ) -> None:
        self._device = device
        self._engine = engine
        self._gpu = gpu
        self._reason = reason
        self._cache = cache
        self._sizes = bucket_sizes(engine.batch)
        self._changing = threading.Lock()  # one change of the table at a time; runs go on beside it
        self._table: DeviceTable | None = None
        self._stream = device.create_stream()
        opened: list[Lane] = []
        try:
            for _ in range(lanes):
                opened.append(Lane(device, engine, self._sizes))
        except BaseException:
            for lane in opened:
                lane.close()
            device.destroy_stream(self._stream)
            engine.close()
            raise
        self._pool = LanePool(opened)

    @property
    def name(self) -> str:
        """The runtime's name, as ``--runtime`` takes it."""
        return self._engine.toolkit.name

    @property
    def input_dtype(self) -> np.dtype[np.generic]:
        """Element type of the graph's ``image`` input."""
        return self._engine.image_dtype

    def bind_table(self, table: Table) -> None:
        """See ``Backend.bind_table``. Both tables are on the device until the last lane reads from the new one."""
        if fault := self._engine.oversize({**table.sizes, SLOT_AXIS: table.slots}):
            raise BackendError(f"{self._engine.found.path.name} cannot take the table: {fault}")
        with self._changing:
            self._pool.check_open()
            self._device.activate()
            new = DeviceTable(self._device, table, self._stream)
            old = self._table

            # The lanes change over one by one, as their runs end; if one cannot, all go back to the old table.
            try:
                self._attach(new)
            except BaseException:
                if old is not None:
                    self._attach(old)
                new.free()
                raise

            # No lane reads from the old table any more.
            self._table = new
            if old is not None:
                old.free()

    def refresh_slot(self, slot: int) -> None:
        """See ``Backend.refresh_slot``. Only the slot's bytes travel; captured graphs stay as they are."""
        with self._changing:
            if self._table is not None:
                self._device.activate()
                self._table.refresh(slot)

    def run(self, images: npt.NDArray[np.generic], slots: npt.NDArray[np.int32] | None) -> npt.NDArray[np.float32]:
        """See ``Backend.run``. More images than the engine takes at once are run in parts."""
        largest = self._sizes[-1]
        with self._pool.any() as lane:
            table = self._table
            if SLOT in self._engine.inputs and table is None:
                raise BackendError("no table is bound; add a task first")
            check_batch(
                images,
                slots,
                shape=self._engine.image_shape,
                dtype=self.input_dtype,
                slot_count=None if table is None else table.table.slots,
            )

            # The engine's largest batch bounds a run; a larger one is run in parts, in order, on the same lane.
            parts = [
                lane.run(images[start : start + largest], None if slots is None else slots[start : start + largest])
                for start in range(0, len(images), largest)
            ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def describe(self) -> RuntimeDescription:
        """See ``Backend.describe``."""
        programs = [program for lane in self._pool.lanes for program in lane.programs]
        captured = sum(program.is_captured for program in programs)
        loaded = LoadedEngine(
            gpu=f"{self._gpu.name} ({self._gpu.sm})",
            file=self._engine.found.path.name,
            batch_sizes=tuple(self._sizes),
            contexts=len(self._pool.lanes),
            cuda_graphs="the runtime's own" if self._engine.captures_itself else f"{captured} captured",
            memory=self._memory(),
            cuda_graphs_refused=tuple(sorted({program.refusal for program in programs if program.refusal})),
            runtime_cache=None if self._cache is None else self._cache.note,
        )
        return RuntimeDescription(
            name=self.name,
            version=self._engine.toolkit.version,
            reason=self._reason,
            threads=None,
            engine=loaded,
            max_batch=loaded.max_batch,
        )

    def close(self) -> None:
        """See ``Backend.close``. Waits for the runs that are under way."""
        if not self._pool.close():
            return
        with self._changing, contextlib.ExitStack() as steps:  # last in, first out; all are tried
            self._device.activate()
            steps.callback(self._device.destroy_stream, self._stream)
            steps.callback(self._engine.close)
            if self._table is not None:
                steps.callback(self._table.free)
                self._table = None
            for lane in self._pool.lanes:
                steps.enter_context(self._pool.this(lane))
                steps.callback(lane.close)

    def _attach(self, table: DeviceTable) -> None:
        """Let every lane read from a table, each as soon as its run has ended."""
        for lane in self._pool.lanes:
            with self._pool.this(lane):
                lane.attach(table)

    def _memory(self) -> DeviceMemory:
        """Return what is allocated on the device."""
        table, staging = self._table, sum(lane.staging_bytes for lane in self._pool.lanes)
        return DeviceMemory(
            weights=self._engine.weight_bytes,
            table=0 if table is None else table.size_bytes,
            staging=staging,
            contexts=self._engine.activation_bytes * len(self._pool.lanes),
            pinned_host=staging,
        )


def native_obstacle(artifact: Artifact, runtime: str) -> str | None:
    """Return why an engine of ``runtime`` cannot run here, or None; loads neither graph nor engine."""
    gpu = find_gpu()
    if gpu is None:
        return gpu_obstacle()
    if obstacle := engine_obstacle(artifact, runtime):
        return obstacle
    if not has_bindings():
        return str(MissingExtraError("cuda.bindings", TOOLKITS[runtime].extra))
    found = find_engine(artifact, runtime, gpu)
    if fault := found.card.profile.oversize(present_sizes(artifact)):
        return (
            f"{found.path.name} is too small for the bundle's tasks: {fault}; run: {build_command(artifact, runtime)}"
        )
    return None


def open_native(artifact: Artifact, runtime: str, reason: str) -> NativeBackend:
    """Load the engine of a graph that fits this machine.

    Args:
        artifact: The bundle or folded model whose graph is run.
        runtime: A key of ``TOOLKITS``.
        reason: Why this runtime was chosen.

    Raises:
        EngineIncompatibleError: No engine fits, or the runtime refuses the one that does.
        BundleCorruptError: The engine's file is not what its sidecar says.
        BackendError: There is no GPU, or it cannot hold the engine.
        MissingExtraError: The runtime or ``cuda.bindings`` is not installed.
    """
    toolkit = load_toolkit(runtime)
    gpu = find_gpu()
    if gpu is None:
        raise BackendError(f"runtime '{runtime}' does not work here: {gpu_obstacle()}")
    found = find_engine(artifact, runtime, gpu)
    verify_engine(found)
    device = CudaDevice(toolkit.spec.extra)
    cache = RuntimeCache(found.path, gpu) if runtime == "tensorrt-rtx" else None
    engine = NativeEngine(toolkit, found, artifact, device, cache)
    return NativeBackend(device, engine, gpu=gpu, reason=reason, cache=cache)
