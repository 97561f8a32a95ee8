"""An engine loaded by TensorRT or TensorRT-RTX: validated, deserialised, compared with the graph, and executed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vpdeploy.backends.native.device import Device
from vpdeploy.backends.native.runtime_cache import RuntimeCache
from vpdeploy.engines.profile import AxisRange
from vpdeploy.engines.store import FoundEngine, build_command
from vpdeploy.engines.toolkit import Toolkit, dtype_name
from vpdeploy.errors import BackendError, EngineIncompatibleError
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.interface import Binding
from vpdeploy.format.layout import IMAGE, LOGITS


class NativeEngine:
    """A deserialised engine and what its execution contexts share.

    Args:
        toolkit: The runtime's module.
        found: The engine's file, verified, and its sidecar.
        artifact: The bundle or folded model that it was built from.
        device: The GPU.
        cache: Where TensorRT-RTX keeps what it compiles at run time; None for TensorRT.

    Raises:
        EngineIncompatibleError: The runtime refuses the file, or its inputs are not those of the graph.
        BackendError: The device cannot hold it.
    """

    def __init__(
        self, toolkit: Toolkit, found: FoundEngine, artifact: Artifact, device: Device, cache: RuntimeCache | None
    ) -> None:
        self.found = found
        self.toolkit = toolkit
        self._rebuild = f"{build_command(artifact, toolkit.name)} --force"
        self._runtime = toolkit.module.Runtime(toolkit.logger)
        if found.card.options.version_compatible:
            # Such an engine brings NVIDIA's lean runtime, code of the host, which is refused unless it is allowed.
            self._runtime.engine_host_code_allowed = True
        data = found.path.read_bytes()
        self._check_validity(data)
        self._engine = self._deserialise(data, device)
        if found.card.options.weight_stripped:
            self._refit(artifact.graph_path)
        self.inputs, self.outputs = self._tensors()
        self._check_interface(artifact)
        self.batch = self._batch_range()
        self.activation_bytes = int(self._engine.device_memory_size_v2)
        self._cache = cache

    @property
    def weight_bytes(self) -> int:
        """The engine's size on disk: what its weights and code take on the device, near enough."""
        return self.found.card.size_bytes

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape of one image, without the batch axis."""
        return tuple(int(size) for size in self.inputs[IMAGE].shape[1:])

    @property
    def image_dtype(self) -> np.dtype[np.generic]:
        """The element type of the ``image`` input."""
        return np.dtype(self.inputs[IMAGE].dtype)

    @property
    def classes(self) -> int:
        """How many logits an image has, C; -1 where the table decides."""
        return int(self.outputs[LOGITS].shape[1])

    @property
    def captures_itself(self) -> bool:
        """Tell whether the runtime captures CUDA graphs of its own."""
        return self._cache is not None

    def create_context(self, activations: int) -> ExecutionContext:
        """Return a new execution context.

        Args:
            activations: The address of ``activation_bytes`` bytes on the device for its intermediate results;
                contexts that never run at the same time may share them.

        Raises:
            BackendError: The runtime refuses.
        """
        module = self.toolkit.module
        self.toolkit.take_errors()
        managed = module.ExecutionContextAllocationStrategy.USER_MANAGED
        settings = managed if self._cache is None else self._cache.configure(self._engine, module)
        context = self._engine.create_execution_context(settings)
        if context is None:
            raise BackendError(f"{self.found.path.name}: no execution context: {self._reason()}")
        if activations:
            context.set_device_memory(activations, self.activation_bytes)
        return ExecutionContext(context, self.toolkit, settings)

    def oversize(self, sizes: dict[str, int]) -> str | None:
        """Return the first size of a table that the engine cannot take, in words, and what to run, or None."""
        fault = self.found.card.profile.oversize(sizes)
        return None if fault is None else f"{fault}; build a wider engine: {self._rebuild}"

    def close(self) -> None:
        """Store what the runtime has compiled, and let go of the engine; its contexts have to be gone already."""
        if self._cache is not None:
            self._cache.store()
        self._engine = self._runtime = None

    def _check_validity(self, data: bytes) -> None:
        """Ask the runtime whether it takes the file, where it can say so (TensorRT-RTX)."""
        if not hasattr(self._runtime, "get_engine_validity"):
            return
        validity, diagnostics = self._runtime.get_engine_validity(data[: self._runtime.engine_header_size])
        if validity == self.toolkit.module.EngineValidity.INVALID:
            members = self.toolkit.module.EngineInvalidityDiagnostics.__members__
            reasons = [name.lower() for name, each in members.items() if int(diagnostics) & int(each)]
            reasons += filter(None, [self.toolkit.take_errors()])
            raise EngineIncompatibleError(
                f"{self.found.path}: {self.toolkit.spec.title} {self.toolkit.version} refuses it "
                f"({', '.join(reasons) or 'no reason given'}), it was built for {self.found.card.place}; "
                f"run: {self._rebuild}"
            )

    def _deserialise(self, data: bytes, device: Device) -> Any:
        self.toolkit.take_errors()
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise EngineIncompatibleError(
                f"{self.found.path}: cannot be loaded ({len(data)} bytes, {device.memory().free_bytes} are free on the "
                f"GPU): {self._reason()}; if the GPU is not full, run: {self._rebuild}"
            )
        return engine

    def _refit(self, graph: Path) -> None:
        """Take the weights of a stripped engine from the graph."""
        module, logger = self.toolkit.module, self.toolkit.logger
        refitter = module.Refitter(self._engine, logger)
        if not module.OnnxParserRefitter(refitter, logger).refit_from_file(str(graph)) or (
            not refitter.refit_cuda_engine()
        ):
            raise EngineIncompatibleError(
                f"{self.found.path}: the weights of {graph} do not fit it: {self._reason()}; run: {self._rebuild}"
            )

    def _tensors(self) -> tuple[dict[str, Binding], dict[str, Binding]]:
        """Return inputs and outputs by name; -1 stands for a dynamic axis."""
        inputs: dict[str, Binding] = {}
        outputs: dict[str, Binding] = {}
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            dtype, shape = self._engine.get_tensor_dtype(name), self._engine.get_tensor_shape(name)
            is_input = self._engine.get_tensor_mode(name) == self.toolkit.module.TensorIOMode.INPUT
            (inputs if is_input else outputs)[name] = Binding(dtype=dtype_name(dtype), shape=tuple(shape))
        return inputs, outputs

    def _check_interface(self, artifact: Artifact) -> None:
        """Compare names, shapes and dtypes with the graph's: a foreign engine would read past the table's end."""
        expected = artifact.interface
        for wanted, found in ((expected.inputs, self.inputs), (expected.outputs, self.outputs)):
            for name in {**wanted, **found}:
                if name not in wanted or name not in found or not _holds(found[name], wanted[name]):
                    raise EngineIncompatibleError(
                        f"{self.found.path}: '{name}' should be {_described(wanted.get(name))}, "
                        f"found {_described(found.get(name))}; run: {self._rebuild}"
                    )

    def _batch_range(self) -> AxisRange:
        """Return how many images the engine takes at once."""
        fixed = int(self.inputs[IMAGE].shape[0])
        if fixed != -1:
            return AxisRange(fixed, fixed, fixed)
        return AxisRange(*(int(shape[0]) for shape in self._engine.get_tensor_profile_shape(IMAGE, 0)))

    def _reason(self) -> str:
        return self.toolkit.take_errors() or f"{self.toolkit.spec.title} gives no reason"


def _holds(found: Binding, wanted: Binding) -> bool:
    """Tell whether an engine's tensor is what the graph has: a profile may fix an axis that the graph leaves open."""
    return (
        found.dtype == wanted.dtype
        and len(found.shape) == len(wanted.shape)
        and all(here == there or isinstance(there, str) for here, there in zip(found.shape, wanted.shape, strict=True))
    )


def _described(binding: Binding | None) -> str:
    return "absent" if binding is None else f"{binding.dtype} {['?' if size == -1 else size for size in binding.shape]}"


class ExecutionContext:
    """A context of a loaded engine; one thread at a time.

    Args:
        context: TensorRT's ``IExecutionContext``.
        toolkit: The runtime that it belongs to.
        settings: What it was created with; kept as long as the context, for nobody says that it is copied.
    """

    def __init__(self, context: Any, toolkit: Toolkit, settings: Any) -> None:
        self._context = context
        self._settings = settings
        self._toolkit = toolkit
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def bind(self, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        """Set the shape of every input and the address of every tensor; what is set already is left alone.

        Raises:
            BackendError: The engine cannot take a shape.
        """
        for name, shape in shapes.items():
            if self._shapes.get(name) != shape:
                self._demand(self._context.set_input_shape(name, shape), f"shape {list(shape)} of '{name}'")
                self._shapes[name] = shape
        for name, address in addresses.items():
            if self._addresses.get(name) != address:
                self._demand(self._context.set_tensor_address(name, address), f"the address of '{name}'")
                self._addresses[name] = address

    def enqueue(self, stream: int) -> None:
        """Queue one run on a stream.

        Raises:
            BackendError: The runtime refuses.
        """
        self._demand(self._context.execute_async_v3(stream), "a run")

    def is_capturable(self, stream: int) -> bool:
        """Tell whether a run may be captured as a CUDA graph, as far as the runtime can say."""
        asks = hasattr(self._context, "is_stream_capturable")
        return bool(self._context.is_stream_capturable(stream)) if asks else True

    def close(self) -> None:
        """Let go of TensorRT's object."""
        self._context = self._settings = None

    def _demand(self, accepted: bool, what: str) -> None:
        if not accepted:
            reason = self._toolkit.take_errors() or "no reason given"
            raise BackendError(f"{self._toolkit.spec.title} refuses {what}: {reason}")
