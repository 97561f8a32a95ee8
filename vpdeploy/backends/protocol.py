"""What a session needs from an inference runtime."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from vpdeploy.backends.description import RuntimeDescription
from vpdeploy.table import Table


class Backend(Protocol):
    """One loaded graph on one device. Every method may be called from any thread."""

    @property
    def name(self) -> str:
        """The runtime's name, as ``--runtime`` takes it."""
        ...

    @property
    def input_dtype(self) -> np.dtype[np.generic]:
        """Element type of the graph's ``image`` input: uint8, or float32 for pipelines that normalise themselves."""
        ...

    def bind_table(self, table: Table) -> None:
        """Make ``table`` the one that slots refer to, from the next run on.

        Raises:
            BackendError: The device or the engine cannot hold it, and the old table stays bound; or the backend was
                closed.
        """
        ...

    def refresh_slot(self, slot: int) -> None:
        """Bring one slot of the bound table, whose host arrays were rewritten, to the device.

        No run that is under way may refer to the slot.

        Raises:
            BackendError: The copy failed.
        """
        ...

    def run(self, images: npt.NDArray[np.generic], slots: npt.NDArray[np.int32] | None) -> npt.NDArray[np.float32]:
        """Run one batch.

        Args:
            images: uint8 [B, H, W, 3], or float32 [B, 3, H, W] if that is ``input_dtype``; C-contiguous.
            slots: int32 [B], or None for a graph without a table.

        Returns:
            Logits, float32 [B, C], owned by the caller.

        Raises:
            BackendError: The runtime failed, no table is bound for a graph that has one, or the backend was closed.
            InputError: Images or slots are of another shape or type, or a slot is not in the table.
        """
        ...

    def describe(self) -> RuntimeDescription:
        """Return what this backend is and why it was chosen, for people and metrics."""
        ...

    def close(self) -> None:
        """Release the graph and the device's memory once runs under way have ended; may be called again."""
        ...
