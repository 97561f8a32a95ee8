"""How the public code brings images to a backbone: the defaults of an imported run's preprocessing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, get_args

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from vpdeploy.errors import SpecError
from vpdeploy.format.preprocessing import Interpolation, Preprocessing, ResizeMode

CROP_RATIO: Final = 0.875
"""The public code scales to 256 pixels for crops of 224, and to 512 for 448."""

Triple = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """The public code's evaluation pipeline for folders and FGVC; VTAB-1k is squashed instead.

    Attributes:
        resize: As ``Preprocessing.resize``.
        crop_ratio: As ``Preprocessing.crop_ratio``; None takes ``CROP_RATIO`` for ``crop``, and ``squash`` has none.
        interpolation: As ``Preprocessing.interpolation``.
        mean: Per-channel mean of pixels in [0, 1]: ImageNet's, for every backbone.
        std: Per-channel standard deviation, likewise.

    Raises:
        SpecError: A value is out of range, or two contradict each other.
    """

    resize: ResizeMode = "crop"
    crop_ratio: float | None = None
    interpolation: Interpolation = "bilinear"
    mean: Triple = IMAGENET_DEFAULT_MEAN
    std: Triple = IMAGENET_DEFAULT_STD

    def __post_init__(self) -> None:
        for option, value, choices in (
            ("--resize", self.resize, get_args(ResizeMode)),
            ("--interpolation", self.interpolation, get_args(Interpolation)),
        ):
            if value not in choices:
                raise SpecError(f"{option} '{value}': choose one of {', '.join(choices)}")
        if self.crop_ratio is not None and self.resize == "squash":
            raise SpecError("--crop-ratio: --resize squash cuts nothing off; leave one of them out")
        if self.crop_ratio is not None and not 0 < self.crop_ratio <= 1:
            raise SpecError(f"--crop-ratio {self.crop_ratio}: expected more than 0 and at most 1")
        if not all(math.isfinite(value) for value in self.mean):
            raise SpecError(f"--mean {self.mean}: expected finite numbers")
        if not all(math.isfinite(value) and value > 0 for value in self.std):
            raise SpecError(f"--std {self.std}: expected finite numbers above 0")

    def preprocessing(self, image_size: int) -> Preprocessing:
        """Return the steps for a backbone of the given image size, in pixels."""
        return Preprocessing(
            image_size=image_size,
            resize=self.resize,
            crop_ratio=1.0 if self.resize == "squash" else self.crop_ratio or CROP_RATIO,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
        )
