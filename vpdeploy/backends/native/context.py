"""One execution context: shapes and addresses of its tensors, and the call that queues its work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vpdeploy.engines.toolkit import Toolkit
from vpdeploy.errors import BackendError


class ExecutionContext:
    """A context of a loaded engine; one thread at a time.

    Args:
        context: TensorRT's object.
        toolkit: The runtime's module.
        settings: What the context was created with; kept as long as it is, for nobody says that it is copied.
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
