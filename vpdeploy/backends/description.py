"""What a backend says of itself, for people, reports and metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """What the native runner has allocated on the device, in bytes.

    Attributes:
        weights: The engine's weights.
        table: The table of prompt sets.
        staging: Images, slots and logits of all lanes.
        contexts: Intermediate results of all lanes, at the profile's largest sizes.
        pinned_host: Page-locked memory of the host, the staging's counterpart; no part of the total.
    """

    weights: int
    table: int
    staging: int
    contexts: int
    pinned_host: int

    @property
    def total(self) -> int:
        """All that is allocated on the device."""
        return self.weights + self.table + self.staging + self.contexts

    def to_json(self) -> dict[str, int]:
        """Return the fields of the JSON form."""
        return {
            "weights": self.weights,
            "table": self.table,
            "staging": self.staging,
            "contexts": self.contexts,
            "total": self.total,
            "pinned_host": self.pinned_host,
        }


@dataclass(frozen=True, kw_only=True)
class LoadedEngine:
    """What the native runner loaded, and how it runs it.

    Attributes:
        gpu: Name and architecture of the GPU, e.g. ``NVIDIA L4 (sm_89)``.
        file: Name of the engine file.
        batch_sizes: Sizes at which batches run, ascending; the last is the largest that the engine takes at once.
        contexts: Lanes that run batches side by side.
        cuda_graphs: Who captures CUDA graphs, or how many runs are captured.
        memory: What is allocated.
        cuda_graphs_refused: Why runs cannot be captured, each reason once; empty where none was refused.
        runtime_cache: What TensorRT-RTX's cache of compiled kernels holds; None where there is no cache.
    """

    gpu: str
    file: str
    batch_sizes: tuple[int, ...]
    contexts: int
    cuda_graphs: str
    memory: DeviceMemory
    cuda_graphs_refused: tuple[str, ...] = ()
    runtime_cache: str | None = None

    @property
    def max_batch(self) -> int:
        """The largest batch that the engine takes at once."""
        return self.batch_sizes[-1]

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the JSON form; what there is not is left out."""
        fields: dict[str, Any] = {
            "gpu": self.gpu,
            "engine": self.file,
            "max_batch": self.max_batch,
            "batch_sizes": list(self.batch_sizes),
            "contexts": self.contexts,
            "cuda_graphs": self.cuda_graphs,
            "memory_bytes": self.memory.to_json(),
        }
        if self.cuda_graphs_refused:
            fields["cuda_graphs_refused"] = list(self.cuda_graphs_refused)
        if self.runtime_cache is not None:
            fields["runtime_cache"] = self.runtime_cache
        return fields


@dataclass(frozen=True, kw_only=True)
class RuntimeDescription:
    """Which runtime a backend is and why it was chosen.

    Attributes:
        name: The runtime's name, as ``--runtime`` takes it.
        version: The version of its library.
        reason: Why it was chosen.
        threads: CPU threads inside one run; None where the runtime chooses, or runs on a GPU.
        note: Something that people should know; None where there is nothing.
        engine: What the native runner loaded; None of ONNX Runtime.
        max_batch: The largest batch that it takes; None where it takes any.
    """

    name: str
    version: str
    reason: str
    threads: int | None
    note: str | None = None
    engine: LoadedEngine | None = None
    max_batch: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the JSON form, those of an engine among them; what there is not is left out."""
        return {
            "runtime": self.name,
            "runtime_version": self.version,
            "reason": self.reason,
            "threads": self.threads,
            **({} if self.note is None else {"note": self.note}),
            **({} if self.max_batch is None else {"max_batch": self.max_batch}),
            **({} if self.engine is None else self.engine.to_json()),
        }
