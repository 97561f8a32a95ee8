"""The table on the device: allocated once, rewritten slot by slot in place."""

from __future__ import annotations

from collections.abc import Iterable

from vpdeploy.backends.native.device import Device, aligned
from vpdeploy.table import Table


class DeviceTable:
    """A copy of a table on the device, whose addresses never change: captured graphs go on reading from it.

    One allocation holds all tensors, so that it succeeds or fails as a whole.

    Args:
        device: The GPU.
        table: The host's arrays; held, not copied.
        stream: For the copies.

    Raises:
        BackendError: The device cannot hold it; nothing is left allocated.
    """

    def __init__(self, device: Device, table: Table, stream: int) -> None:
        self.table = table
        self._device = device
        self._stream = stream
        self._offsets: dict[str, int] = {}
        self.size_bytes = 0
        for name, array in table.arrays.items():
            self._offsets[name] = self.size_bytes
            self.size_bytes += aligned(array.nbytes)
        self._address = device.allocate(self.size_bytes, f"a table of {table.slots} slots")
        try:
            self._copy((name, 0, array.nbytes) for name, array in table.arrays.items())
        except BaseException:
            device.free(self._address)
            raise

    @property
    def addresses(self) -> dict[str, int]:
        """Where each tensor begins, by name."""
        return {name: self._address + offset for name, offset in self._offsets.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Each tensor's shape, [S, ...], by name."""
        return {name: array.shape for name, array in self.table.arrays.items()}

    def refresh(self, slot: int) -> None:
        """Copy one slot's bytes of every tensor, and wait for them.

        Raises:
            BackendError: The copy failed.
        """
        rows = {name: array.nbytes // len(array) for name, array in self.table.arrays.items()}
        self._copy((name, slot * size, size) for name, size in rows.items())

    def free(self) -> None:
        """Free the device's memory; no run may read from it any more."""
        self._device.free(self._address)

    def _copy(self, pieces: Iterable[tuple[str, int, int]]) -> None:
        """Copy pieces of tensors: name, first byte and number of bytes."""
        for name, start, size in pieces:
            source = self.table.arrays[name].ctypes.data + start
            self._device.copy_in(self._address + self._offsets[name] + start, source, size, self._stream)
        self._device.synchronize(self._stream)
