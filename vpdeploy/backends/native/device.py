"""What the native runner needs of a GPU: memory, streams and captured graphs. ``CudaDevice`` is the real one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

ALIGNMENT = 256
"""Every tensor begins at a multiple of this many bytes, as ``cudaMalloc`` and TensorRT have it."""


@dataclass(frozen=True, kw_only=True)
class Pinned:
    """Page-locked host memory: the GPU copies from and to it while the host does something else.

    Attributes:
        address: Of its first byte.
        data: The same bytes, uint8 [size].
    """

    address: int
    data: npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class FreeMemory:
    """Memory of the GPU, of all processes together.

    Attributes:
        free_bytes: Not allocated.
        total_bytes: All.
    """

    free_bytes: int
    total_bytes: int


class Device(Protocol):
    """One GPU. Addresses, streams and graphs are integers that only the device understands.

    Every method raises BackendError, in one line that says what to do.
    """

    def activate(self) -> None:
        """Make this the calling thread's device."""
        ...

    def memory(self) -> FreeMemory:
        """Return how much memory is free."""
        ...

    def allocate(self, size: int, purpose: str) -> int:
        """Return the address of ``size`` bytes on the device; ``purpose`` names them where memory is short."""
        ...

    def free(self, address: int) -> None:
        """Free what ``allocate`` returned; waits for work that is under way."""
        ...

    def allocate_pinned(self, size: int) -> Pinned:
        """Return ``size`` page-locked bytes of the host."""
        ...

    def free_pinned(self, pinned: Pinned) -> None:
        """Free what ``allocate_pinned`` returned."""
        ...

    def create_stream(self) -> int:
        """Return a queue whose work is done in order, beside that of other streams."""
        ...

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream whose work is done."""
        ...

    def copy_in(self, target: int, source: int, size: int, stream: int) -> None:
        """Queue a copy of ``size`` bytes from the host to the device."""
        ...

    def copy_out(self, target: int, source: int, size: int, stream: int) -> None:
        """Queue a copy of ``size`` bytes from the device to the host."""
        ...

    def synchronize(self, stream: int) -> None:
        """Wait until a stream's work is done."""
        ...

    def begin_capture(self, stream: int) -> None:
        """Record what this thread queues on a stream from now on, instead of doing it."""
        ...

    def end_capture(self, stream: int) -> int:
        """Return what was recorded, ready to be launched."""
        ...

    def launch(self, graph: int, stream: int) -> None:
        """Queue a captured graph as one piece of work."""
        ...

    def destroy_graph(self, graph: int) -> None:
        """Destroy a captured graph that is not under way."""
        ...


def aligned(size: int) -> int:
    """Return a size rounded up to the next tensor's beginning."""
    return -(-size // ALIGNMENT) * ALIGNMENT
