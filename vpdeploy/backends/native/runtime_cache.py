"""What TensorRT-RTX compiles at run time, kept beside the engine so that the next start finds it done.

TensorRT-RTX compiles an engine's kernels for the GPU when a context is created and, lazily, once more for every shape.
Its own CUDA graphs know when these are ready; a graph captured by us would keep the slow ones that served until then.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from vpdeploy.files import write_atomically
from vpdeploy.machine import Gpu

_log = logging.getLogger(__name__)

SUFFIX = ".runtime-cache"


class RuntimeCache:
    """One engine's cache for one GPU and driver.

    Args:
        engine: The engine's file.
        gpu: The GPU that is here.

    Attributes:
        path: ``KEY.GPU-cudaVERSION.runtime-cache`` beside the engine.
        note: What became of the file, for ``describe``.
    """

    def __init__(self, engine: Path, gpu: Gpu) -> None:
        device = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
        self.path = engine.with_name(f"{engine.stem}.{device}-cuda{gpu.cuda_version}{SUFFIX}")
        self.note = "empty: kernels are compiled during the first runs"
        self._cache: Any = None
        self._stored = b""

    def configure(self, engine: Any, module: Any) -> Any:
        """Return an ``IRuntimeConfig`` for one context of an engine; all of them share the cache."""
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(module.ExecutionContextAllocationStrategy.USER_MANAGED)
        config.cuda_graph_strategy = module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        # Lazy, the default: a new shape is answered by a general kernel at once, and by its own one when that is ready.
        strategy = module.DynamicShapesKernelSpecializationStrategy.LAZY
        config.dynamic_shapes_kernel_specialization_strategy = strategy
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            self._load()
        config.set_runtime_cache(self._cache)
        return config

    def store(self) -> None:
        """Write what was compiled, whole or not at all; a folder that cannot be written costs the next start only."""
        if self._cache is None:
            return
        serialized, self._cache = self._cache.serialize(), None
        data = b"" if serialized is None else bytes(memoryview(serialized))
        if data in (b"", self._stored):
            return
        try:
            write_atomically(self.path, data)
        except OSError as error:
            _log.warning("%s: cannot be written (%s); the next start compiles again", self.path, error.strerror)

    def _load(self) -> None:
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            self.note = f"{self.path.name} cannot be read ({error.strerror}); kernels are compiled again"
            return
        if self._cache.deserialize(data):
            self._stored = data
            self.note = f"{self.path.name}, {len(data)} bytes"
        else:
            self.note = f"{self.path.name} is damaged or of another driver and is ignored; kernels are compiled again"
