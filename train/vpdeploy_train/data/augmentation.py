"""Augmentations by name, built of torchvision's and timm's transforms."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, cast

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

from vpdeploy.errors import SpecError
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy.image import fit_image

Transform = Callable[[Image.Image], Image.Image]

CROP_RATIO: Final = 0.875
"""Largest share of the scaled image's side that a random crop keeps: 224 of 256 pixels, as in the papers."""

_MAX_ASPECT: Final = 4


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How training images are varied; it can be pickled, as it travels to worker processes.

    Attributes:
        name: Its name in the registry.
        prepare: The part that does not vary: an upright RGB image of any size to a small one, to be kept.
        vary: The part that varies: a prepared image to one of the backbone's size. Draws from the random states
            of torch, NumPy and Python.
    """

    name: str
    prepare: Transform
    vary: Transform


def build_augmentation(name: str, preprocessing: Preprocessing) -> Augmentation | None:
    """Build an augmentation for a backbone's image size, resize mode and interpolation; None for ``none``.

    Raises:
        SpecError: There is no augmentation of that name.
    """
    if name not in AUGMENTATIONS:
        raise SpecError(f"unknown augmentation '{name}'; expected one of: {', '.join(AUGMENTATIONS)}")
    build = AUGMENTATIONS[name]
    return None if build is None else build(name, preprocessing)


@contextmanager
def seeded_randomness(seed: tuple[int, ...]) -> Iterator[None]:
    """Give the CPU random states of torch, NumPy and Python a seed, and put them back afterwards.

    Args:
        seed: Non-negative integers, together the seed.
    """
    words = [int(word) for word in np.random.SeedSequence(seed).generate_state(4)]
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reseed the accelerators as well, and repeat their dropout masks.
        torch.default_generator.manual_seed(words[0] << 32 | words[1])
        np.random.seed(words[2])
        random.seed(words[3])
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def _build_flip(name: str, preprocessing: Preprocessing) -> Augmentation:
    """Build the augmentation that mirrors the evaluation pixels or does not."""
    return Augmentation(
        name=name,
        prepare=partial(_fit, preprocessing=preprocessing),
        vary=transforms.RandomHorizontalFlip(),
    )


def _build_crop(name: str, preprocessing: Preprocessing) -> Augmentation:
    """Build the one that scales the shorter side (both sides for ``squash``) and cuts out a random square."""
    return Augmentation(
        name=name,
        prepare=partial(_scale, preprocessing=preprocessing),
        vary=transforms.RandomCrop(preprocessing.image_size),
    )


def _build_crop_flip(name: str, preprocessing: Preprocessing) -> Augmentation:
    """Build the one that cuts out a random crop, mirrored or not."""
    return Augmentation(
        name=name,
        prepare=partial(_scale, preprocessing=preprocessing),
        vary=transforms.Compose([transforms.RandomCrop(preprocessing.image_size), transforms.RandomHorizontalFlip()]),
    )


def _build_rand_augment(name: str, preprocessing: Preprocessing) -> Augmentation:
    """Build a random crop, mirrored or not, that passes timm's RandAugment (magnitude 9 ± 0.5, two operations)."""
    from timm.data.auto_augment import rand_augment_transform

    mean = tuple(round(255 * value) for value in preprocessing.mean)
    settings = {"translate_const": round(0.45 * preprocessing.image_size), "img_mean": mean}
    return Augmentation(
        name=name,
        prepare=partial(_scale, preprocessing=preprocessing),
        vary=transforms.Compose(
            [
                transforms.RandomCrop(preprocessing.image_size),
                transforms.RandomHorizontalFlip(),
                # A magnitude of 10 would posterize to 0 bits, which Pillow refuses.
                rand_augment_transform("rand-m9-mstd0.5-mmax9-inc1", settings),
            ]
        ),
    )


AUGMENTATIONS: Final[Mapping[str, Callable[[str, Preprocessing], Augmentation] | None]] = {
    "none": None,
    "flip": _build_flip,
    "crop": _build_crop,
    "crop-flip": _build_crop_flip,
    "rand-augment": _build_rand_augment,
}
"""Every augmentation."""


def scaled_side(preprocessing: Preprocessing) -> int:
    """Return the shorter side, in pixels, to which images are scaled before a random crop."""
    return round(preprocessing.image_size / min(preprocessing.crop_ratio, CROP_RATIO))


def _fit(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Bring an image to the form in which it is evaluated."""
    return Image.fromarray(fit_image(image, preprocessing))


def _scale(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Scale an image for a random crop."""
    side = scaled_side(preprocessing)
    size: Any = side
    if preprocessing.resize == "squash":
        size = (side, side)
    elif max(image.size) > _MAX_ASPECT * min(image.size):
        # A strip would grow without bound when its shorter side is scaled up.
        longest = _MAX_ASPECT * min(image.size)
        image = functional.center_crop(image, [min(image.height, longest), min(image.width, longest)])
    interpolation = functional.InterpolationMode(preprocessing.interpolation)
    return cast(Image.Image, functional.resize(image, size, interpolation))
