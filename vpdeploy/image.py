"""Pictures, in whatever form a caller has them, brought to the backbone's size.

Training, the parity gate, prediction and the server all decode here, so what is served is what was trained.
"""

from __future__ import annotations

import contextlib
import io
import re
import stat
import struct
from collections.abc import Callable
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

_MAX_SCANS = 200
"""A JPEG of more scans is refused: each costs a pass over all pixels, and some bytes of the file. Encoders write 10."""

_SCAN = b"\xff\xda"
_WINDOW = 1 << 20

_BAND_PIXELS = 1 << 20
"""Conversions that need wide numbers or layers work on as many pixels at a time."""

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

_TURNS = (b"Exif", b"eXIf", b"exif", b"EXIF", b"adobe.xmp", b"/xap/", b"XMP ")
"""What announces data that may ask for a turn; a PNG's may follow its pixels."""

_GREY_OF_16_BIT = ((np.arange(1 << 16) + 128) // 257).astype(np.uint8)
"""255/65535 of each 16-bit value, rounded."""

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
    image = _decode(source, shorter_side=shorter_side, max_pixels=max_pixels, admit=None)
    # Also where it is RGB already: what the file told of itself is not kept.
    return image.convert("RGB")


def _decode(
    source: Path | bytes, *, shorter_side: int | None, max_pixels: int, admit: Callable[[int], None] | None
) -> Image.Image:
    """Decode as ``decode_image`` does, but leave grey images grey (mode L): their channels need not be held thrice."""
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
            if isinstance(source, bytes) and image.info.get("progressive") and _count(source, _SCAN) > _MAX_SCANS:
                raise InputError(f"{name}: a JPEG of more than the accepted {_MAX_SCANS} scans")
            full_size = image.size
            if shorter_side is not None:
                image.draft("RGB", _draft_size(image.size, shorter_side))
            if admit is not None:
                admit(_decoding_bytes(image, full_size, source))
            image.load()
            with contextlib.suppress(*_DAMAGE):  # unreadable EXIF data asks for no turn
                ImageOps.exif_transpose(image, in_place=True)
            return _to_8_bit(image)
    except PermissionError:
        raise InputError(f"{name}: may not be read: check its permissions") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(f"{name}: more than the accepted {max_pixels} pixels") from None
    except (*_DAMAGE, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "cannot identify" in reason:
            # Pillow would print the name again, or a buffer's address.
            is_empty = not (source if isinstance(source, bytes) else source.stat().st_size)
            reason = "empty, 0 bytes" if is_empty else "not in a known image format"
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
    """Bring an RGB or grey image to the backbone's size.

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
    fitted = image.resize((size, size), resample, box=box)
    return np.array(fitted if fitted.mode == "RGB" else fitted.convert("RGB"), dtype=np.uint8)


def load_pixels(
    source: Path | bytes,
    preprocessing: Preprocessing,
    *,
    max_pixels: int = MAX_PIXELS,
    admit: Callable[[int], None] | None = None,
) -> npt.NDArray[np.uint8]:
    """Decode an image and bring it to the backbone's size.

    Args:
        source: A file, or the bytes of one.
        preprocessing: Size, resize mode and interpolation.
        max_pixels: Refuse images of more pixels.
        admit: Called before any pixel is decoded, with the bytes of memory that decoding will take at most; what it
            raises refuses the image.

    Returns:
        Pixels, uint8 [H, W, 3] with H = W = ``image_size``.

    Raises:
        InputError: The file is missing, not an image, damaged, or too large; the message names a file's path.
        MissingExtraError: Pillow is not installed.
    """
    shorter_side = round(preprocessing.image_size / preprocessing.crop_ratio)
    image = _decode(source, shorter_side=shorter_side, max_pixels=max_pixels, admit=admit)
    return fit_image(image, preprocessing)


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


def _decoding_bytes(image: Image.Image, full_size: tuple[int, int], source: Path | bytes) -> int:
    """Return an upper bound of the memory that decoding takes, in bytes, from what the header says.

    Args:
        image: The image, opened and not yet loaded; of a JPEG, at the scale at which it will be decoded.
        full_size: Width and height in the file.
        source: The file, or its bytes.
    """
    pixels = image.width * image.height
    # The pixels as decoded, in Pillow's 1, 2 or 4 bytes.
    wide = {"1": 1, "L": 1, "P": 1}.get(image.mode, 2 if image.mode.startswith("I;16") else 4)
    total = pixels * wide
    # A second copy: converted, or turned upright. A small file is not searched for a reason to.
    upright = (
        pixels > _BAND_PIXELS
        and image.format != "TIFF"
        and isinstance(source, bytes)
        and not any(_count(source, mark) for mark in _TURNS)
    )
    if image.mode not in ("RGB", "L") or not upright:
        total += pixels * (1 if image.mode.startswith(("I", "F")) else 4)
    # libwebp holds two canvases beside Pillow's; a JPEG of many scans all its coefficients, 2 bytes each.
    if image.format == "WEBP":
        total += pixels * 8
    if image.info.get("progressive"):
        total += full_size[0] * full_size[1] * 2 * len(image.getbands())
    return total


def _count(data: bytes, mark: bytes) -> int:
    """Count occurrences of a mark window by window, so that other threads may run in between."""
    return sum(data.count(mark, start, start + _WINDOW + len(mark) - 1) for start in range(0, len(data), _WINDOW))


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Convert any of Pillow's modes to 8-bit RGB, or what is grey to mode L; RGB and L are returned as they are."""
    if image.mode.startswith(("I", "F")):  # 16-bit grey and its relatives
        return _in_bands(image, "L", _grey_band)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return _in_bands(image, "RGB", _over_white)
    if image.mode in ("RGB", "L"):
        return image
    return image.convert("RGB")


def _in_bands(image: Image.Image, mode: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Convert some rows at a time, so that what ``convert`` needs on the way is never as large as the image."""
    from PIL import Image

    rows = max(1, _BAND_PIXELS // image.width)
    converted = Image.new(mode, image.size)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        converted.paste(convert(band), (0, top))
    return converted


def _grey_band(band: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits, and clip what has other ranges."""
    from PIL import Image

    values = np.asarray(band)
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return Image.fromarray(_GREY_OF_16_BIT.take(values))
    scale = 255.0 / 65535.0 if band.mode.startswith("I") else 1.0
    grey = np.clip(np.nan_to_num(values.astype(np.float64)) * scale + 0.5, 0, 255).astype(np.uint8)
    return Image.fromarray(grey)


def _over_white(band: Image.Image) -> Image.Image:
    from PIL import Image

    layered = band.convert("RGBA")
    white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, layered).convert("RGB")
