"""Pictures, in whatever form a caller has them, brought to the backbone's size.

Training, the parity gate, prediction and the server all decode here, so what is served is what was trained.
"""

from __future__ import annotations

import contextlib
import io
import re
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vpdeploy.errors import InputError, MissingExtraError
from vpdeploy.format.preprocessing import Preprocessing

if TYPE_CHECKING:
    from PIL import Image

    Picture = Path | str | bytes | npt.NDArray[np.uint8] | Image.Image

MAX_PIXELS = 64_000_000
"""Images with more pixels are refused before they are decoded (decompression bombs)."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")
_DEVICES = (Path("/dev"), Path("/proc"))

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

# What Pillow's decoders raise on damaged files; Warning where the caller has turned warnings into errors.
_DAMAGE = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, OSError, SyntaxError),
    *(TypeError, ValueError, Warning, struct.error),
)


def decode_image(source: Path | bytes, *, shorter_side: int | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an encoded image to upright 8-bit RGB.

    The EXIF rotation is applied, transparency is laid over white, 16-bit and grey images become 8-bit RGB, of an
    animation the first frame is taken.

    Args:
        source: A file, or the bytes of one.
        shorter_side: The caller's target, in pixels: a JPEG that is at least twice as large is decoded at a reduced
            scale that is still no smaller than this.
        max_pixels: Refuse images of more pixels.

    Raises:
        InputError: The file is missing, not an image, damaged, or too large, or the path is that of a folder, a pipe or
            a URL; the message names a file's path.
        MissingExtraError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError:
        raise MissingExtraError("PIL", "serve") from None
    # A path has no empty parts: a URL that became one gets its second slash back.
    name = "image" if isinstance(source, bytes) else _URL.sub(r"\1://", str(source), count=1)
    if isinstance(source, Path) and (problem := problem_of_place(source)):
        raise InputError(f"{name}: {problem}")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS) as image:
            _check_size(image.size, name, max_pixels)
            if shorter_side is not None:
                image.draft("RGB", _draft_size(image.size, shorter_side))
            image.load()
            with contextlib.suppress(*_DAMAGE):  # unreadable EXIF data asks for no turn
                ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except PermissionError:
        raise InputError(f"{name}: may not be read: check its permissions") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(f"{name}: more than the accepted {max_pixels} pixels") from None
    except (*_DAMAGE, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "cannot identify" in reason:
            reason = "not in a known image format"  # Pillow would print the name again, or a buffer's address
        raise InputError(f"{name}: not a readable image ({reason}); expected {', '.join(_FORMATS)}") from error


def is_url(name: str) -> bool:
    """Tell whether a name is spelled as that of something elsewhere."""
    return _URL.match(name) is not None


def problem_of_place(path: Path) -> str | None:
    """Return why there can be no image at a path, and what to do, without opening it; None where it may be tried.

    A pipe that nobody writes to is refused because it would be waited for without an end. Those that a shell puts in
    the place of ``<(command)`` are not: somebody does write to them.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "is a URL; download it first (curl -O) and name the file" if is_url(str(path)) else "file not found"
    except (OSError, ValueError):
        return None  # opening it says more
    if stat.S_ISDIR(mode):
        return "is a folder; name the images in it"
    if stat.S_ISFIFO(mode) and not any(place in path.parents for place in _DEVICES):
        return "is a pipe, not a file"
    return None


def fit_image(image: Image.Image, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Bring an RGB image to the backbone's size.

    Returns:
        Pixels, uint8 [H, W, 3] with H = W = ``image_size``, owned by the caller.
    """
    from PIL import Image

    size = preprocessing.image_size
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    resample = filters[preprocessing.interpolation]
    width, height = image.size
    if preprocessing.resize == "squash":
        box = (0.0, 0.0, float(width), float(height))
    else:
        # The centre of the scaled image, cut out of the unscaled one: one resampling, no intermediate.
        side = min(width, height) * preprocessing.crop_ratio
        box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    return np.array(image.resize((size, size), resample, box=box), dtype=np.uint8)


def load_pixels(
    source: Path | bytes, preprocessing: Preprocessing, *, max_pixels: int = MAX_PIXELS
) -> npt.NDArray[np.uint8]:
    """Decode an image and bring it to the backbone's size.

    Returns:
        Pixels, uint8 [H, W, 3] with H = W = ``image_size``.

    Raises:
        InputError: The file is missing, not an image, damaged, or too large; the message names a file's path.
        MissingExtraError: Pillow is not installed.
    """
    shorter_side = round(preprocessing.image_size / preprocessing.crop_ratio)
    return fit_image(decode_image(source, shorter_side=shorter_side, max_pixels=max_pixels), preprocessing)


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


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    """Refuse an image by its header, before any pixel is decoded."""
    width, height = size
    if width * height > max_pixels:
        raise InputError(f"{name}: {width}×{height} is more than the accepted {max_pixels} pixels")
    if width < 1 or height < 1:
        raise InputError(f"{name}: the image is empty ({width}×{height})")


def _draft_size(size: tuple[int, int], shorter_side: int) -> tuple[int, int]:
    """Return the smallest size with the image's aspect ratio whose shorter side is at least the target."""
    shorter = min(size)
    target = min(shorter, shorter_side)
    return size[0] * target // shorter, size[1] * target // shorter


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any of Pillow's modes to 8-bit RGB."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):  # 16-bit grey and its relatives
        values = np.asarray(image, dtype=np.float64)
        scale = 255.0 / 65535.0 if image.mode.startswith("I") else 1.0
        grey = np.clip(np.nan_to_num(values) * scale + 0.5, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")
