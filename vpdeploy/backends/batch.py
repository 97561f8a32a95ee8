"""What every backend checks of a batch: a GPU answers a slot that is not there with a lost context, not an error."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vpdeploy.errors import InputError


def check_batch(
    images: npt.NDArray[np.generic],
    slots: npt.NDArray[np.int32] | None,
    *,
    shape: tuple[int, ...],
    dtype: np.dtype[np.generic],
    slot_count: int | None,
) -> None:
    """Check a batch against what the graph takes.

    Args:
        images: [B, *shape].
        slots: int32 [B], or None for a graph without a table.
        shape: Of one image.
        dtype: Of the graph's ``image`` input.
        slot_count: Slots of the bound table; None for a graph without one.

    Raises:
        InputError: They do not fit.
    """
    if images.dtype != dtype or images.shape[1:] != shape or len(images) == 0:
        raise InputError(
            f"images should be {dtype} [B, {', '.join(map(str, shape))}], found {images.dtype} {list(images.shape)}"
        )
    if slot_count is None:
        if slots is not None:
            raise InputError("a folded model takes no slots; it holds one task")
        return
    if slots is None or slots.dtype != np.int32 or slots.shape != images.shape[:1]:
        found = "none" if slots is None else f"{slots.dtype} {list(slots.shape)}"
        raise InputError(f"slots should be int32 [{len(images)}], found {found}")
    if not 0 <= slots.min() <= slots.max() < slot_count:
        raise InputError(f"slots should be in [0, {slot_count}), found {slots.tolist()[:8]}")
