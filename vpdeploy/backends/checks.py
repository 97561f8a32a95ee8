"""The last check of a batch: a GPU answers a slot that is not there with a lost context, not an error.

Who hands a batch on unchanged, as a session does, leaves the check to the backend.
"""

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
        shape: Shape of one image.
        dtype: Element type of the graph's ``image`` input.
        slot_count: How many slots the bound table has; None for a graph without one.

    Raises:
        InputError: The batch does not fit.
    """
    check_images(images, shape=shape, dtype=dtype)
    if slot_count is not None:
        check_slots(slots, count=len(images), slot_count=slot_count)
    elif slots is not None:
        raise InputError("a folded model takes no slots; it holds one task")


def check_images(images: npt.NDArray[np.generic], *, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> None:
    """Check the images of a batch, at least one.

    Args:
        images: [B, *shape].
        shape: Shape of one image.
        dtype: Type of the images' elements.

    Raises:
        InputError: The batch does not fit.
    """
    if images.dtype != dtype or images.shape[1:] != shape or len(images) == 0:
        raise InputError(
            f"images should be {dtype} [B, {', '.join(map(str, shape))}], found {images.dtype} {list(images.shape)}"
        )


def check_slots(slots: npt.NDArray[np.int32] | None, *, count: int, slot_count: int) -> None:
    """Check the slots of a batch, at least one.

    Args:
        slots: int32 [B], numbers in [0, ``slot_count``).
        count: How many images the batch has, B.
        slot_count: How many slots the table has.

    Raises:
        InputError: The batch does not fit.
    """
    fits = slots is not None and slots.dtype == np.int32 and slots.shape == (count,)
    if slots is None or not fits or not 0 <= slots.min() <= slots.max() < slot_count:
        found = "none" if slots is None else f"{slots.dtype} {slots.tolist()[:8]}"
        raise InputError(f"slots should be {count} integers in [0, {slot_count}), int32, found {found}")
