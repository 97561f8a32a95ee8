"""ONNX Runtime, on the CPU or through one of its GPU providers."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vpdeploy.backends.checks import check_batch
from vpdeploy.backends.description import RuntimeDescription
from vpdeploy.backends.native.cuda import copy_to_device, has_bindings
from vpdeploy.backends.providers import (
    CPU_PROVIDER,
    CUDA_PROVIDER,
    PROVIDERS,
    onnxruntime,
    open_session,
    ort_errors,
    plugin_of,
)
from vpdeploy.engines.profile import BATCH
from vpdeploy.errors import BackendError
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.layout import IMAGE, LOGITS, SLOT
from vpdeploy.table import Table

__all__ = ["CPU_PROVIDER", "CUDA_PROVIDER", "OrtBackend", "open_ort"]

_NVIDIA = (
    0x10DE  # PCI vendor: memory of a plug-in's GPU is asked for by vendor, since ONNX Runtime knows no "cuda" then
)

_CASTS = "float16 runs through casts to float32 on the CPU; export without --fp16 for a CPU"


class OrtBackend:
    """A graph loaded into ONNX Runtime; the table is bound once and stays on the device.

    On the CPU the table's host arrays are the device's: a slot written there needs no copy.

    Args:
        graph: An ONNX file.
        provider: A key of ``PROVIDERS``.
        threads: CPU threads inside one run; None leaves it to ONNX Runtime.
        reason: Why this runtime was chosen; shown by ``describe``.
        options: The provider's settings.
        note: Something that people should know, shown by ``describe``.

    Raises:
        BackendError: The graph cannot be loaded, or the provider does not work here.
        MissingExtraError: ONNX Runtime is not installed.
    """

    def __init__(
        self,
        graph: Path,
        *,
        provider: str,
        threads: int | None,
        reason: str,
        options: Mapping[str, str] | None = None,
        note: str | None = None,
    ) -> None:
        self._ort = onnxruntime()
        self._provider = PROVIDERS[provider]
        self._threads = threads
        self._reason = reason
        self._note = note
        self._place: tuple[str, int] | tuple[str, int, int] = (self._provider.device, 0)
        if plugin_of(self._provider) is not None:
            self._place = ("gpu", 0, _NVIDIA)
        self._session: Any = open_session(graph, provider, threads=threads, options=options)
        self._lock = threading.Lock()  # one binding, one device: runs take turns
        self._binding = self._session.io_binding()
        self._table: Table | None = None
        self._table_values: dict[str, Any] = {}
        inputs = {node.name: node for node in self._session.get_inputs()}
        if IMAGE not in inputs or LOGITS not in [node.name for node in self._session.get_outputs()]:
            raise BackendError(f"{graph}: not written by vpdeploy export, no '{IMAGE}' input or '{LOGITS}' output")
        self._input_dtype = np.dtype(np.uint8 if inputs[IMAGE].type == "tensor(uint8)" else np.float32)
        self._image_shape = tuple(inputs[IMAGE].shape[1:])  # of one image; vpdeploy's graphs leave the batch open only
        self._has_table = SLOT in inputs

    @property
    def name(self) -> str:
        """The runtime's name, as ``--runtime`` takes it."""
        return self._provider.runtime

    @property
    def input_dtype(self) -> np.dtype[np.generic]:
        """Element type of the graph's ``image`` input."""
        return self._input_dtype

    def bind_table(self, table: Table) -> None:
        """See ``Backend.bind_table``."""
        session = self._loaded()
        with ort_errors(f"the table of {table.slots} slots ({table.size_bytes} bytes) cannot be bound"):
            values = {
                name: self._ort.OrtValue.ortvalue_from_numpy(array, *self._place)
                for name, array in table.arrays.items()
            }
            binding = session.io_binding()
            for name, value in values.items():
                binding.bind_ortvalue_input(name, value)
        with self._lock:
            self._table, self._table_values, self._binding = table, values, binding

    def refresh_slot(self, slot: int) -> None:
        """See ``Backend.refresh_slot``."""
        table = self._table
        if self._provider.device == "cpu" or table is None:
            return
        with self._lock:
            for name, value in self._table_values.items():
                self._refresh(value, table.arrays[name], slot)

    def run(self, images: npt.NDArray[np.generic], slots: npt.NDArray[np.int32] | None) -> npt.NDArray[np.float32]:
        """See ``Backend.run``."""
        with self._lock:
            session, table = self._loaded(), self._table
            if self._has_table and table is None:
                raise BackendError("no table is bound; add a task first")
            slot_count = None if table is None else table.slots
            check_batch(images, slots, shape=self._image_shape, dtype=self._input_dtype, slot_count=slot_count)
            with ort_errors(f"ONNX Runtime failed on a batch of {len(images)}"):
                self._binding.bind_cpu_input(IMAGE, images)
                if slots is not None:
                    self._binding.bind_cpu_input(SLOT, slots)
                self._binding.bind_output(LOGITS, "cpu")
                session.run_with_iobinding(self._binding)
                logits: npt.NDArray[np.float32] = self._binding.copy_outputs_to_cpu()[0]
        return logits

    def describe(self) -> RuntimeDescription:
        """See ``Backend.describe``."""
        return RuntimeDescription(
            name=self.name,
            version=self._ort.__version__,
            reason=self._reason,
            threads=self._threads,
            note=self._note,
            max_batch=BATCH.largest if self._provider.has_profiles else None,
        )

    def close(self) -> None:
        """See ``Backend.close``."""
        with self._lock:
            self._binding = self._session = None
            self._table_values.clear()
            self._table = None

    def _loaded(self) -> Any:
        if self._session is None:
            raise BackendError("the session is closed; load the bundle again")
        return self._session

    def _refresh(self, value: Any, array: npt.NDArray[np.generic], slot: int) -> None:
        """Bring one slot of one tensor to the device.

        ONNX Runtime copies whole tensors only; where ``cuda.bindings`` is installed, the slot's bytes alone travel.
        """
        size = array.nbytes // len(array)
        if has_bindings():
            copy_to_device(value.data_ptr() + slot * size, array.ctypes.data + slot * size, size)
            return
        with ort_errors(f"slot {slot} cannot be brought to the device"):
            value.update_inplace(array)


def open_ort(artifact: Artifact, provider: str, threads: int | None, reason: str) -> OrtBackend:
    """Load a graph with one of ONNX Runtime's providers, a key of ``PROVIDERS``.

    Raises:
        BackendError: The graph cannot be loaded, or the provider does not work here.
        MissingExtraError: ONNX Runtime is not installed.
    """
    casts = provider == CPU_PROVIDER and artifact.precision == "fp16"
    return OrtBackend(
        artifact.graph_path,
        provider=provider,
        threads=threads,
        reason=reason,
        options=PROVIDERS[provider].options(artifact),
        note=_CASTS if casts else None,
    )
