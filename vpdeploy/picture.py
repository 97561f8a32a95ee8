"""Pictures in whatever form a caller has them, and the graph's input made of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vpdeploy.errors import InputError, MissingExtraError
from vpdeploy.image import fit_image, load_pixels
from vpdeploy.preprocessing import Preprocessing

if TYPE_CHECKING:
    from PIL import Image

    Picture = Path | str | bytes | npt.NDArray[np.uint8] | Image.Image


def to_pixels(picture: Picture, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Bring a picture to the backbone's size.

    Args:
        picture: A path, the bytes of an image file, a Pillow image, or RGB pixels uint8 [H, W, 3] of any size.
        preprocessing: Size, resize mode and interpolation.

    Returns:
        uint8 [H, W, 3] with H = W = ``image_size``.

    Raises:
        InputError: The picture cannot be read, or the array is of another shape or dtype.
        MissingExtraError: Pillow is needed and not installed.
    """
    if isinstance(picture, (str, Path)):
        return load_pixels(Path(picture), preprocessing)
    if isinstance(picture, bytes):
        return load_pixels(picture, preprocessing)
    if not isinstance(picture, np.ndarray):
        return fit_image(picture.convert("RGB"), preprocessing)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
        raise InputError(f"image should be uint8 [H, W, 3], found {picture.dtype} {list(picture.shape)}")
    size = preprocessing.image_size
    if picture.shape[:2] == (size, size) and preprocessing.resize == "squash":
        return picture
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise MissingExtraError("PIL", "serve") from None
    return fit_image(Image.fromarray(picture), preprocessing)


def normalise(images: npt.NDArray[np.uint8], preprocessing: Preprocessing) -> npt.NDArray[np.float32]:
    """Turn uint8 pixels [B, H, W, 3] into normalised float32 [B, 3, H, W], for graphs that take these."""
    mean = np.asarray(preprocessing.mean, dtype=np.float32)
    std = np.asarray(preprocessing.std, dtype=np.float32)
    normalised = (images.astype(np.float32) / 255.0 - mean) / std
    channels_first: npt.NDArray[np.float32] = normalised.transpose(0, 3, 1, 2)
    return channels_first
