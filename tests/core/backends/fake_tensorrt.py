"""Modules with the part of ``tensorrt``'s and ``tensorrt_rtx``'s API that the native runner uses.

An engine file is a line of JSON, the profile's shapes by input, and the ONNX file. Contexts evaluate it by ONNX Runtime
on the CPU, in the turn of the stream on which they are queued, at the addresses that they had when they were queued.
"""

from __future__ import annotations

import enum
import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from core.backends.host_device import HostDevice

DataType = enum.Enum("DataType", ["FLOAT", "HALF", "BF16", "UINT8", "INT32", "INT64"])
TensorIOMode = enum.Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
Strategy = enum.Enum("ExecutionContextAllocationStrategy", ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"])
Validity = enum.IntEnum("EngineValidity", ["VALID", "SUBOPTIMAL", "INVALID"], start=0)
Diagnostics = enum.IntFlag("EngineInvalidityDiagnostics", {"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2})
GraphStrategy = enum.Enum("CudaGraphStrategy", ["DISABLED", "WHOLE_GRAPH_CAPTURE"])
Specialization = enum.Enum("DynamicShapesKernelSpecializationStrategy", ["LAZY", "EAGER", "NONE"])

_TYPES = {
    "tensor(float)": (DataType.FLOAT, np.float32),
    "tensor(float16)": (DataType.HALF, np.float16),
    "tensor(uint8)": (DataType.UINT8, np.uint8),
    "tensor(int32)": (DataType.INT32, np.int32),
}
ACTIVATION_BYTES = 4096


class Logger:
    Severity = enum.Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


class Knobs:
    """What tests change of a fake module."""

    def __init__(self) -> None:
        self.capturable = True
        self.refuse_contexts_after: int | None = None
        self.refuse_runs = False
        self.corrupt = False
        self.holds_host_code = False
        self.validity = (Validity.VALID, Diagnostics(0))
        self.contexts: list[Context] = []
        self.on_execute = lambda: None
        self.refitted: list[str] = []


class Context:
    def __init__(self, engine: Engine, *, managed: bool) -> None:
        self._engine = engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] | None = None if managed else (0, 0)
        self._changes = 0

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= ACTIVATION_BYTES
        self._memory = (memory, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._changes += 1
        low, _, high = self._engine.profile[name]
        if len(shape) != len(low) or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            self._engine.error(f"{name}: {shape} is outside the profile")
            return False
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._changes += 1
        assert address % 256 == 0, "TensorRT asks for aligned tensors"
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        engine, shapes, addresses = self._engine, dict(self._shapes), dict(self._addresses)
        engine.knobs.on_execute()
        if engine.knobs.refuse_runs or self._memory is None:
            engine.error("enqueueV3 was refused")
            return False
        assert set(shapes) == set(engine.profile)
        assert set(addresses) == {*engine.profile, *engine.outputs}
        changes = self._changes
        captured = stream in engine.device._captures

        def work() -> None:
            if captured:
                assert self._changes == changes, "a graph is replayed after its context was changed"
            feeds = {}
            for name, shape in shapes.items():
                dtype = np.dtype(_TYPES[engine.types[name]][1])
                data = engine.device.bytes_at(addresses[name], math.prod(shape) * dtype.itemsize)
                feeds[name] = data.view(dtype).reshape(shape)
            (found,) = engine.session.run(None, feeds)
            target = engine.device.bytes_at(addresses[engine.outputs[0]], found.nbytes)
            target[...] = np.ascontiguousarray(found).view(np.uint8).reshape(-1)

        engine.device.queue(stream, work)
        return True


class RtxContext(Context):
    def is_stream_capturable(self, stream: int) -> bool:
        return self._engine.knobs.capturable


class RuntimeCache:
    def __init__(self) -> None:
        self.content = b""

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(b"compiled"):
            return False
        self.content = blob
        return True

    def serialize(self) -> bytes:
        return self.content or b"compiled kernels"


class RuntimeConfig:
    def __init__(self) -> None:
        self.cuda_graph_strategy = GraphStrategy.DISABLED
        self.dynamic_shapes_kernel_specialization_strategy = Specialization.NONE
        self.strategy = Strategy.STATIC
        self.cache: RuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class Engine:
    context_class: type[Context] = Context

    def __init__(self, data: bytes, device: HostDevice, logger: Any, knobs: Knobs) -> None:
        header, _, graph = data.partition(b"\n")
        self.device, self.knobs, self._logger = device, knobs, logger
        self.profile = {name: tuple(map(tuple, shapes)) for name, shapes in json.loads(header).items()}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.outputs = [node.name for node in self.session.get_outputs()]
        nodes = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.types = {node.name: node.type for node in nodes}
        self._shapes = {node.name: tuple(s if isinstance(s, int) else -1 for s in node.shape) for node in nodes}

    device_memory_size_v2 = ACTIVATION_BYTES

    @property
    def num_io_tensors(self) -> int:
        return len(self._shapes)

    def get_tensor_name(self, index: int) -> str:
        return list(self._shapes)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return _TYPES[self.types[name]][0]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def get_tensor_mode(self, name: str) -> Any:
        return TensorIOMode.OUTPUT if name in self.outputs else TensorIOMode.INPUT

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        assert profile_index == 0
        return list(self.profile[name])

    def create_execution_context(self, settings: Any) -> Context | None:
        refuse_after = self.knobs.refuse_contexts_after
        if refuse_after is not None and len(self.knobs.contexts) >= refuse_after:
            self.error("out of memory")
            return None
        strategy = settings.strategy if isinstance(settings, RuntimeConfig) else settings
        context = self.context_class(self, managed=strategy == Strategy.USER_MANAGED)
        self.knobs.contexts.append(context)
        return context

    def error(self, message: str) -> None:
        self._logger.log(Logger.Severity.ERROR, message)


class RtxEngine(Engine):
    context_class = RtxContext

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()


class Refitter:
    def __init__(self, engine: Engine, logger: Any) -> None:
        self.engine = engine

    def refit_cuda_engine(self) -> bool:
        return True


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: Any) -> None:
        self._engine = refitter.engine

    def refit_from_file(self, model: str) -> bool:
        self._engine.knobs.refitted.append(model)
        return True


def fake_module(name: str, device: HostDevice) -> tuple[Any, Knobs]:
    """A module, and what tests change of it."""
    knobs = Knobs()
    rtx = name == "tensorrt-rtx"

    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None:
            if knobs.holds_host_code and not self.engine_host_code_allowed:
                self._logger.log(Logger.Severity.ERROR, "the engine contains host code, which is not allowed")
                return None
            if knobs.corrupt:
                self._logger.log(Logger.Severity.ERROR, "Serialization assertion failed")
                return None
            return (RtxEngine if rtx else Engine)(serialized_engine, device, self._logger, knobs)

    class RtxRuntime(Runtime):
        engine_header_size = 64

        def get_engine_validity(self, buffer: bytes) -> tuple[Any, Any]:
            assert len(buffer) == self.engine_header_size
            return knobs.validity

    module = SimpleNamespace(
        __version__="1.7.1.116" if rtx else "10.13.0.35",
        ILogger=Logger,
        Runtime=RtxRuntime if rtx else Runtime,
        Builder=object,
        DataType=DataType,
        TensorIOMode=TensorIOMode,
        ExecutionContextAllocationStrategy=Strategy,
        Refitter=Refitter,
        OnnxParserRefitter=OnnxParserRefitter,
        ICudaEngine=RtxEngine if rtx else Engine,
        IExecutionContext=RtxContext if rtx else Context,
    )
    if rtx:
        module.EngineValidity = Validity
        module.EngineInvalidityDiagnostics = Diagnostics
        module.CudaGraphStrategy = GraphStrategy
        module.DynamicShapesKernelSpecializationStrategy = Specialization
        module.IRuntimeCache = RuntimeCache
        module.IRuntimeConfig = RuntimeConfig
    return module, knobs
