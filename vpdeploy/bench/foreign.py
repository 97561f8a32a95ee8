"""Any ONNX file with one image input as a subject, such as a model that another tool exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vpdeploy.backends import AUTO
from vpdeploy.backends.description import RuntimeDescription
from vpdeploy.backends.providers import (
    CPU_PROVIDER,
    CUDA_PROVIDER,
    PROVIDERS,
    onnxruntime,
    open_session,
    ort_errors,
)
from vpdeploy.bench.subject import BatchRun, Cell, SubjectFacts
from vpdeploy.errors import BackendError, SpecError
from vpdeploy.format.bundle import is_bundle
from vpdeploy.format.onnxfile import read_graph, weights_bytes
from vpdeploy.machine import gpu_obstacle

_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
}
_PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_CHANNELS = 3
_CPU, _CUDA = PROVIDERS[CPU_PROVIDER].runtime, PROVIDERS[CUDA_PROVIDER].runtime


class ForeignSubject:
    """An ONNX file in ONNX Runtime, run as ``vpdeploy.backends.ort`` runs ours, so that the two compare.

    Args:
        path: The file.
        name: What reports call it.
        runtime: ``onnxruntime-cpu``, ``onnxruntime-cuda`` or ``auto``.
        threads: CPU threads inside one run; None leaves it to ONNX Runtime.

    Raises:
        BundleError: The file is no ONNX file.
        SpecError: It has several inputs, or one that is no image of a fixed size; or another runtime was asked for.
        BackendError: ONNX Runtime cannot load it, or the provider does not work here.
    """

    tasks = 1

    def __init__(self, path: Path, *, name: str, runtime: str, threads: int | None) -> None:
        self.name = name
        self._path = path
        self._onnx = read_graph(path)
        self._threads = threads
        self._runtime, self._reason = _choose_runtime(path, runtime)
        provider = CUDA_PROVIDER if self._runtime == _CUDA else CPU_PROVIDER
        self._session = open_session(path, provider, threads=threads)
        self._version = str(onnxruntime().__version__)
        self._input = _sole_input(path, self._session.get_inputs())
        self._shape = _image_shape(path, self._input)
        self._dtype = _DTYPES[self._input.type]
        batch = self._input.shape[0]
        self.fixed_batch: int | None = batch if isinstance(batch, int) else None
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._binding = self._session.io_binding()

    def prepare(self, cell: Cell, seed: int) -> BatchRun:
        """See ``Subject.prepare``; every mix runs alike."""
        rng = np.random.default_rng(seed)
        shape = (cell.batch, *self._shape)
        images: npt.NDArray[np.generic]
        if self._dtype is np.uint8:
            images = rng.integers(0, 256, shape, dtype=np.uint8)
        else:
            images = rng.standard_normal(shape, dtype=np.float32).astype(self._dtype)
        return lambda: self._run(images)

    def facts(self) -> SubjectFacts:
        """See ``Subject.facts``."""
        weight_type = self._onnx.weight_type
        return SubjectFacts(
            name=self.name,
            kind="ONNX file",
            path=str(self._path),
            opset=self._onnx.opset,
            graph_bytes=sum(weights_bytes(self._path, self._onnx)),
            input=str(np.dtype(self._dtype)),
            tasks=self.tasks,
            copied_tasks=0,
            runtime=RuntimeDescription(
                name=self._runtime, version=self._version, reason=self._reason, threads=self._threads
            ),
            precision=None if weight_type is None else _PRECISIONS.get(weight_type, weight_type),
            image_size=self._image_size,
        )

    def close(self) -> None:
        """See ``Subject.close``."""
        self._binding = self._session = None

    @property
    def _image_size(self) -> tuple[int, int]:
        """Height and width, in pixels."""
        channels_first = self._shape[0] == _CHANNELS
        height, width = self._shape[1:] if channels_first else self._shape[:2]
        return height, width

    def _run(self, images: npt.NDArray[np.generic]) -> None:
        with ort_errors(f"{self._path}: ONNX Runtime failed on a batch of {len(images)}"):
            self._binding.bind_cpu_input(self._input.name, images)
            for name in self._outputs:
                self._binding.bind_output(name, "cpu")
            self._session.run_with_iobinding(self._binding)
            self._binding.copy_outputs_to_cpu()


def _choose_runtime(path: Path, runtime: str) -> tuple[str, str]:
    """Return a runtime's name and why it was chosen."""
    if runtime not in (AUTO, _CPU, _CUDA):
        raise SpecError(
            f"{path}: was not written by vpdeploy export, so runtime '{runtime}' cannot run it; "
            f"choose {_CPU}, {_CUDA} or {AUTO}"
        )
    if runtime == _CPU:
        return runtime, "asked for"
    available = CUDA_PROVIDER in onnxruntime().get_available_providers()
    obstacle = gpu_obstacle() if available else "the installed onnxruntime has no CUDA provider"
    if runtime == AUTO:
        chosen = _CUDA if obstacle is None else _CPU
        reasons = [] if obstacle is None else [f"{_CUDA}: {obstacle}"]
        return chosen, "; ".join([*reasons, "fastest that works here"])
    if obstacle is not None:
        raise BackendError(f"runtime '{runtime}' does not work here: {obstacle}")
    return runtime, "asked for"


def _sole_input(path: Path, inputs: list[Any]) -> Any:
    if len(inputs) == 1:
        return inputs[0]
    names = ", ".join(node.name for node in inputs) or "none"
    advice = "give the bundle's folder" if is_bundle(path.parent) else "give one with a single image input, or a bundle"
    raise SpecError(f"{path}: has {len(inputs)} inputs ({names}), bench makes images only; {advice}")


def _image_shape(path: Path, node: Any) -> tuple[int, ...]:
    """Return the shape of one image: [3, H, W] or [H, W, 3]."""
    shape = tuple(node.shape)
    sizes = shape[1:]
    fits = len(shape) == 4 and all(isinstance(size, int) for size in sizes)
    if not fits or _CHANNELS not in (sizes[0], sizes[-1]) or node.type not in _DTYPES:
        raise SpecError(
            f"{path}: input '{node.name}' is {node.type} {list(shape)}; expected one image input of fixed size, "
            "float32, float16 or uint8 [B, 3, H, W] or [B, H, W, 3]; export it with a fixed height and width"
        )
    return sizes
