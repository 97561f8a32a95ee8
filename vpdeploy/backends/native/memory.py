"""Memory of the native runner: the buffers that a lane's batches pass through, and the table on the device."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from vpdeploy.backends.native.device import Device, aligned
from vpdeploy.format.layout import IMAGE, LOGITS, SLOT
from vpdeploy.table import Table


class Staging:
    """Room for batches of up to ``capacity`` images.

    The buffers of every batch size begin at the same addresses, so that one set serves all captured graphs.

    Args:
        device: The GPU.
        capacity: How many images fit in it.
        image_shape: The shape of one image, without the batch axis.
        image_dtype: The element type of the graph's ``image`` input.
        classes: How many logits an image has, C.
        with_slots: Whether the graph has a ``slot`` input.

    Raises:
        BackendError: There is not enough memory; nothing is left allocated.
    """

    def __init__(
        self,
        device: Device,
        *,
        capacity: int,
        image_shape: tuple[int, ...],
        image_dtype: np.dtype[np.generic],
        classes: int,
        with_slots: bool,
    ) -> None:
        self.capacity = capacity
        self._device = device

        # One block holds all tensors, each at a multiple of the alignment.
        self._row_bytes = {IMAGE: math.prod(image_shape) * image_dtype.itemsize}
        if with_slots:
            self._row_bytes[SLOT] = 4
        self._row_bytes[LOGITS] = 4 * classes
        self._offsets: dict[str, int] = {}
        self.size_bytes = 0
        for name, size in self._row_bytes.items():
            self._offsets[name] = self.size_bytes
            self.size_bytes += aligned(size * capacity)

        # The block is there twice, on the host and on the device, or not at all.
        self._host = device.allocate_pinned(self.size_bytes)
        try:
            self._address = device.allocate(self.size_bytes, f"staging for {capacity} images")
        except BaseException:
            device.free_pinned(self._host)
            raise

        # The host's block is read and written through arrays of the tensors' own types.
        self._images = self._view(IMAGE).view(image_dtype).reshape(capacity, *image_shape)
        self._slots = self._view(SLOT).view(np.int32) if with_slots else None
        self._logits = self._view(LOGITS).view(np.float32).reshape(capacity, classes)

    @property
    def addresses(self) -> dict[str, int]:
        """Where each tensor begins on the device, by name."""
        return {name: self._address + offset for name, offset in self._offsets.items()}

    def fill(self, images: npt.NDArray[np.generic], slots: npt.NDArray[np.int32] | None, rows: int) -> None:
        """Write a batch to the host's buffers; rows beyond it keep an old image, and ask for the first row's slot.

        Args:
            images: A batch in the graph's form, at most ``capacity`` images.
            slots: Each image's slot, int32 [B], or None where the graph has no such input.
            rows: How many rows are run, at least B.
        """
        count = len(images)
        self._images[:count] = images
        if self._slots is not None and slots is not None:
            self._slots[:count] = slots
            self._slots[count:rows] = slots[0]

    def send(self, rows: int, stream: int) -> None:
        """Queue the copies of the inputs to the device."""
        for name in (IMAGE, SLOT):
            if name in self._offsets:
                offset = self._offsets[name]
                size = rows * self._row_bytes[name]
                self._device.copy_in(self._address + offset, self._host.address + offset, size, stream)

    def fetch(self, rows: int, stream: int) -> None:
        """Queue the copy of the logits to the host."""
        offset = self._offsets[LOGITS]
        size = rows * self._row_bytes[LOGITS]
        self._device.copy_out(self._host.address + offset, self._address + offset, size, stream)

    def logits(self, count: int) -> npt.NDArray[np.float32]:
        """Return a copy of the logits that were fetched, float32 [B, C], owned by the caller."""
        fetched: npt.NDArray[np.float32] = self._logits[:count].copy()
        return fetched

    def free(self) -> None:
        """Free both sides; nothing may be under way."""
        del self._images, self._slots, self._logits
        self._device.free(self._address)
        self._device.free_pinned(self._host)

    def _view(self, name: str) -> npt.NDArray[np.uint8]:
        start = self._offsets[name]
        return self._host.data[start : start + self._row_bytes[name] * self.capacity]


class DeviceTable:
    """A copy of a table on the device, whose addresses never change: captured graphs go on reading from it.

    One allocation holds all tensors, so that it succeeds or fails as a whole.

    Args:
        device: The GPU.
        table: The host's arrays, which are held and not copied.
        stream: The stream on which the copies to the device are queued.

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
