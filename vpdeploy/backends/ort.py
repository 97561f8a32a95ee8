"""ONNX Runtime, on the CPU or through its CUDA provider."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vpdeploy.errors import BackendError, MissingExtraError
from vpdeploy.gpu import gpu_obstacle
from vpdeploy.layout import IMAGE, LOGITS, SLOT
from vpdeploy.table import Table

CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"

_RUNTIME_NAMES = {CPU_PROVIDER: "onnxruntime-cpu", CUDA_PROVIDER: "onnxruntime-cuda"}
_QUIET = 3  # ONNX Runtime's log level "error": it warns about missing GPUs on every CPU machine


class OrtBackend:
    """A graph loaded into ONNX Runtime; the table is bound once and stays on the device.

    On the CPU the table's host arrays are the device's: a slot written there needs no copy.

    Args:
        graph: An ONNX file.
        provider: ``CPU_PROVIDER`` or ``CUDA_PROVIDER``.
        threads: CPU threads inside one run; None leaves it to ONNX Runtime.
        reason: Why this runtime was chosen; shown by ``describe``.

    Raises:
        BackendError: The graph cannot be loaded, or the provider does not work here.
        MissingExtraError: ONNX Runtime is not installed.
    """

    def __init__(self, graph: Path, *, provider: str, threads: int | None, reason: str) -> None:
        ort = _onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = _QUIET
        # Threads may spin within a run, not between runs: decoding and other sessions need the cores.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        providers = [provider] if provider == CPU_PROVIDER else [provider, CPU_PROVIDER]
        try:
            self._session = ort.InferenceSession(str(graph), options, providers=providers)
        except Exception as error:  # ONNX Runtime raises a class of its own per status code
            raise BackendError(f"{graph}: ONNX Runtime cannot load it: {_one_line(error)}") from error
        if self._session.get_providers()[0] != provider:
            raise BackendError(
                f"{provider} could not be started (are its CUDA and cuDNN libraries installed?); "
                "choose --runtime onnxruntime-cpu to run without it"
            )
        self._ort = ort
        self._provider = provider
        self._device = "cpu" if provider == CPU_PROVIDER else "cuda"
        self._threads = threads
        self._reason = reason
        self._lock = threading.Lock()  # one binding, one device: runs take turns
        self._binding = self._session.io_binding()
        self._table: Table | None = None
        self._table_values: dict[str, Any] = {}
        inputs = {node.name: node for node in self._session.get_inputs()}
        if IMAGE not in inputs or LOGITS not in [node.name for node in self._session.get_outputs()]:
            raise BackendError(f"{graph}: not written by vpdeploy export, no '{IMAGE}' input or '{LOGITS}' output")
        self._input_dtype = np.dtype(np.uint8 if inputs[IMAGE].type == "tensor(uint8)" else np.float32)

    @property
    def name(self) -> str:
        """The runtime's name, as ``--runtime`` takes it."""
        return _RUNTIME_NAMES[self._provider]

    @property
    def input_dtype(self) -> np.dtype[np.generic]:
        """Element type of the graph's ``image`` input."""
        return self._input_dtype

    def bind_table(self, table: Table) -> None:
        """See ``Backend.bind_table``."""
        try:
            values = {
                name: self._ort.OrtValue.ortvalue_from_numpy(array, self._device, 0)
                for name, array in table.arrays.items()
            }
            binding = self._session.io_binding()
            for name, value in values.items():
                binding.bind_ortvalue_input(name, value)
        except Exception as error:
            raise BackendError(
                f"the table of {table.slots} slots ({table.size_bytes} bytes) cannot be bound: {_one_line(error)}"
            ) from error
        with self._lock:
            self._table, self._table_values, self._binding = table, values, binding

    def refresh_slot(self, slot: int) -> None:
        """See ``Backend.refresh_slot``."""
        if self._device == "cpu" or self._table is None:
            return
        # ONNX Runtime copies whole values only; a table is small beside the backbone.
        with self._lock:
            for name, value in self._table_values.items():
                value.update_inplace(self._table.arrays[name])

    def run(self, images: npt.NDArray[np.generic], slots: npt.NDArray[np.int32] | None) -> npt.NDArray[np.float32]:
        """See ``Backend.run``."""
        with self._lock:
            try:
                self._binding.bind_cpu_input(IMAGE, images)
                if slots is not None:
                    self._binding.bind_cpu_input(SLOT, slots)
                self._binding.bind_output(LOGITS, "cpu")
                self._session.run_with_iobinding(self._binding)
                logits: npt.NDArray[np.float32] = self._binding.copy_outputs_to_cpu()[0]
            except Exception as error:
                raise BackendError(f"ONNX Runtime failed on a batch of {len(images)}: {_one_line(error)}") from error
        return logits

    def describe(self) -> dict[str, Any]:
        """See ``Backend.describe``."""
        return {
            "runtime": self.name,
            "runtime_version": self._ort.__version__,
            "reason": self._reason,
            "threads": self._threads,
        }

    def close(self) -> None:
        """See ``Backend.close``."""
        with self._lock:
            self._binding = self._session = None
            self._table_values.clear()
            self._table = None


def cuda_obstacle() -> str | None:
    """Return why ONNX Runtime's CUDA provider cannot work here, or None.

    The driver is asked directly: trying the provider on a machine without a GPU prints several lines of errors.
    """
    if CUDA_PROVIDER not in _onnxruntime().get_available_providers():
        return "the installed onnxruntime has no CUDA provider (install onnxruntime-gpu)"
    return gpu_obstacle()


def _onnxruntime() -> Any:
    """Import ONNX Runtime, quietly."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise MissingExtraError("onnxruntime", "all") from None
    onnxruntime.set_default_logger_severity(_QUIET)
    return onnxruntime


def _one_line(error: Exception) -> str:
    """Return an error's text without line breaks."""
    return " ".join(str(error).split())[:500]
