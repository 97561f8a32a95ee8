"""A device in the host's memory: queued work is done when a stream is waited for, and addresses are checked."""

from __future__ import annotations

import ctypes
import threading
from collections import Counter
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from vpdeploy.backends.native.device import FreeMemory, Pinned, cuda_fault, memory_fault
from vpdeploy.errors import BackendError

Work = Callable[[], None]

RELEASES = ("free", "free_pinned", "destroy_stream", "destroy_graph")


class HostDevice:
    """See ``Device``.

    Attributes:
        calls: How often each method was called.
        fail_at: The number of the call, counted over all but releases and from 0, that fails; None for none.
        on_synchronize: Called before a stream's work is done.
    """

    def __init__(self, *, total: int = 1 << 30) -> None:
        self.calls: Counter[str] = Counter()
        self.fail_at: int | None = None
        self.fail_calls: set[str] = set()
        self.on_synchronize: Callable[[], None] = lambda: None
        self.total = total
        self.copied_in = 0
        self._lock = threading.Lock()
        self._number = 0
        self._next = 0x7000_0000_0000
        self._memory: dict[int, npt.NDArray[np.uint8]] = {}
        self._pinned: dict[int, npt.NDArray[np.uint8]] = {}
        self._streams: dict[int, list[Work]] = {}
        self._captures: dict[int, list[Work]] = {}
        self._graphs: dict[int, list[Work]] = {}
        self._turns: dict[int, threading.Lock] = {}

    @property
    def allocated(self) -> int:
        return sum(map(len, self._memory.values()))

    @property
    def alive(self) -> int:
        """What was made and not released."""
        return len(self._memory) + len(self._pinned) + len(self._streams) + len(self._graphs)

    @property
    def graphs(self) -> int:
        return len(self._graphs)

    @property
    def numbered_calls(self) -> int:
        """Calls so far, releases left out."""
        return self._number

    def activate(self) -> None:
        self._count("activate")

    def memory(self) -> FreeMemory:
        return FreeMemory(free_bytes=self.total - self.allocated, total_bytes=self.total)

    def allocate(self, size: int, purpose: str) -> int:
        self._count("allocate")
        if size > self.total - self.allocated:
            raise memory_fault(purpose, size, self.memory().free_bytes)
        address = self._new(size)
        self._memory[address] = np.full(size, 0xCD, np.uint8)
        return address

    def free(self, address: int) -> None:
        self._count("free")
        for stream in list(self._streams):  # cudaFree waits for the device
            self._work_off(stream)
        del self._memory[address]

    def allocate_pinned(self, size: int) -> Pinned:
        self._count("allocate_pinned")
        data = np.full(size, 0xCD, np.uint8)
        self._pinned[data.ctypes.data] = data
        return Pinned(address=data.ctypes.data, data=data)

    def free_pinned(self, pinned: Pinned) -> None:
        self._count("free_pinned")
        del self._pinned[pinned.address]

    def create_stream(self) -> int:
        self._count("create_stream")
        stream = self._new(1)
        self._streams[stream] = []
        return stream

    def destroy_stream(self, stream: int) -> None:
        self._count("destroy_stream")
        assert not self._streams[stream], "a stream is destroyed with work in it"
        del self._streams[stream]

    def copy_in(self, target: int, source: int, size: int, stream: int) -> None:
        self._count("copy_in")
        self.copied_in += size
        self.queue(stream, lambda: _move(self.bytes_at(target, size), source))

    def copy_out(self, target: int, source: int, size: int, stream: int) -> None:
        self._count("copy_out")
        self.queue(stream, lambda: ctypes.memmove(target, self.bytes_at(source, size).ctypes.data, size) and None)

    def synchronize(self, stream: int) -> None:
        self._count("synchronize")
        self.on_synchronize()
        assert stream not in self._captures, "a stream is waited for while it is captured"
        self._work_off(stream)

    def begin_capture(self, stream: int) -> None:
        self._count("begin_capture")
        self._captures[stream] = []

    def end_capture(self, stream: int) -> int:
        recorded = self._captures.pop(stream)
        self._count("end_capture")
        graph = self._new(1)
        self._graphs[graph] = recorded
        return graph

    def launch(self, graph: int, stream: int) -> None:
        self._count("launch")
        self._streams[stream] += self._graphs[graph]

    def destroy_graph(self, graph: int) -> None:
        self._count("destroy_graph")
        del self._graphs[graph]

    # --- for the fake engine ---

    def queue(self, stream: int, work: Work) -> None:
        """Do some work in a stream's turn, or record it."""
        self._captures.get(stream, self._streams[stream]).append(work)

    def bytes_at(self, address: int, size: int) -> npt.NDArray[np.uint8]:
        """The device's bytes; beyond an allocation is an illegal address, as on a GPU."""
        for start, data in self._memory.items():
            if start <= address and address + size <= start + len(data):
                return data[address - start : address - start + size]
        raise cuda_fault("kernel", "cudaErrorIllegalAddress", "an illegal memory access was encountered")

    def _work_off(self, stream: int) -> None:
        with self._turns.setdefault(stream, threading.Lock()):
            queued, self._streams[stream] = self._streams[stream], []
            for work in queued:
                work()

    def _new(self, size: int) -> int:
        with self._lock:
            address = self._next
            self._next += -(-size // 4096) * 4096 + 4096
        return address

    def _count(self, name: str) -> None:
        self.calls[name] += 1
        if name in self.fail_calls:
            raise cuda_fault(name, "cudaErrorLaunchFailure", "unspecified launch failure")
        if name in RELEASES:
            return
        number, self._number = self._number, self._number + 1
        if number == self.fail_at:
            raise BackendError(f"call {number}, {name}, failed")


def _move(target: npt.NDArray[np.uint8], source: int) -> None:
    ctypes.memmove(target.ctypes.data, source, len(target))
