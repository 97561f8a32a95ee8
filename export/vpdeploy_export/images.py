"""Images for the parity gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from vpdeploy.errors import InputError, SpecError, VpdeployError
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy.image import load_pixels
from vpdeploy.tree import is_image
from vpdeploy_train.data import ImageDataset
from vpdeploy_train.data.resolve import data_place
from vpdeploy_train.run import Run

_T = TypeVar("_T")

GATE_IMAGES = 64
"""How many images the gate runs for each task at most."""


@dataclass(frozen=True, kw_only=True)
class GateImages:
    """Pixels to compare on.

    Attributes:
        pixels: uint8 [B, H, W, 3].
        source: Where they come from, for the report.
    """

    pixels: npt.NDArray[np.uint8]
    source: str


def gate_images(run: Run, folder: Path | None) -> GateImages:
    """Return images for one run: of a folder, else of its own validation split, else synthetic ones.

    Raises:
        SpecError: ``folder`` holds no images.
        InputError: An image of ``folder`` cannot be decoded.
    """
    preprocessing = run.card.preprocessing
    if folder is not None:
        return folder_images(folder, preprocessing)
    if run.data is None:
        return synthetic_images(preprocessing, "the run was imported and has no data of its own")
    try:
        examples = _spread(run.read_data().split("val"))
        pixels = _sound_pixels(ImageDataset(examples, preprocessing))
        return GateImages(pixels=pixels, source=f"{len(pixels)} validation images of {Path(run.data).name}")
    except VpdeployError as error:
        # The report travels with the artifact: the folder's name may, its place on this machine may not.
        reason = str(error).removeprefix(f"{run.path}: ").replace(run.data, Path(run.data).name)
        if (place := data_place(run.data)) is not None:
            reason = reason.replace(str(place), place.name)
        reason = reason.partition(";")[0]
        return synthetic_images(preprocessing, f"the run's own are not available: {reason}; --images DIR gives others")


def images_without_run(preprocessing: Preprocessing, folder: Path | None) -> GateImages:
    """Return images where there is no run to take them from: of a folder, else synthetic ones.

    Raises:
        SpecError: ``folder`` holds no images.
        InputError: An image of ``folder`` cannot be decoded.
    """
    if folder is not None:
        return folder_images(folder, preprocessing)
    return synthetic_images(preprocessing, "none were given")


def folder_images(folder: Path, preprocessing: Preprocessing) -> GateImages:
    """Return images of a folder, evenly spread over its files.

    Raises:
        SpecError: The folder holds no images.
        InputError: One cannot be decoded.
    """
    files = sorted(file for file in folder.rglob("*") if is_image(file))
    if not files:
        raise SpecError(f"--images {folder}: no image files found")
    chosen = _spread(files)
    try:
        pixels = np.stack([load_pixels(file, preprocessing) for file in chosen])
    except InputError as error:
        raise InputError(f"--images: {error}") from error
    return GateImages(pixels=pixels, source=f"{len(pixels)} images of {folder.name}")


def synthetic_images(preprocessing: Preprocessing, reason: str) -> GateImages:
    """Return smooth random images: noise alone would be unlike anything a backbone has seen."""
    rng = np.random.default_rng(0)
    size = preprocessing.image_size
    coarse = rng.integers(0, 256, (GATE_IMAGES // 2, 1 + size // 8, 1 + size // 8, 3))
    smooth = coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :size, :size]
    pixels = np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
    return GateImages(pixels=pixels, source=f"{len(pixels)} synthetic images ({reason})")


def _sound_pixels(dataset: ImageDataset) -> npt.NDArray[np.uint8]:
    """Return the pixels of the images that can be decoded, uint8 [B, H, W, 3]; training has told of the others."""
    pixels, first = [], None
    for index in range(len(dataset)):
        try:
            pixels.append(dataset[index][0].numpy())
        except InputError as error:
            first = first or error
    if not pixels and first is not None:
        raise first
    return np.stack(pixels)


def _spread(items: Sequence[_T]) -> tuple[_T, ...]:
    """Return at most ``GATE_IMAGES`` items, evenly spread, so that every class is likely among them."""
    step = max(1, len(items) / GATE_IMAGES)
    return tuple(items[int(index * step)] for index in range(min(GATE_IMAGES, len(items))))
