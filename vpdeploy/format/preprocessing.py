"""How an image becomes the pixels a backbone expects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from vpdeploy.errors import BundleCorruptError
from vpdeploy.format.document import Document

ResizeMode = Literal["crop", "squash"]
Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The steps from a decoded RGB image to the backbone's input.

    Attributes:
        image_size: Height and width of the backbone's input, in pixels.
        resize: ``crop`` scales the shorter side to ``image_size / crop_ratio`` and cuts out the centre;
            ``squash`` scales both sides to ``image_size`` and ignores the aspect ratio.
        crop_ratio: Share of the scaled image that the centre crop keeps, in (0, 1]; 1 for ``squash``.
        interpolation: The resampling filter; both are antialiased.
        mean: Per-channel mean (RGB) of pixels in [0, 1].
        std: Per-channel standard deviation (RGB) of pixels in [0, 1].
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: ResizeMode = "crop"
    crop_ratio: float = 0.9
    interpolation: Interpolation = "bicubic"

    def to_fields(self) -> dict[str, Any]:
        """Return the fields of the JSON form."""
        return {
            "image_size": self.image_size,
            "resize": self.resize,
            "crop_ratio": self.crop_ratio,
            "interpolation": self.interpolation,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_document(cls, document: Document) -> Preprocessing:
        """Read the JSON form.

        Raises:
            BundleCorruptError: A field is missing, of another type, or out of range.
        """
        size = document.take("image_size", int)
        resize = document.take("resize", str)
        interpolation = document.take("interpolation", str)
        ratio = document.take("crop_ratio", float)
        mean = document.take_list("mean", float)
        std = document.take_list("std", float)
        if not 1 <= size <= 4096 or not 0 < ratio <= 1 or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise BundleCorruptError(f"{document.source}: preprocessing is out of range: {document.fields}")
        if resize not in get_args(ResizeMode) or interpolation not in get_args(Interpolation):
            raise BundleCorruptError(f"{document.source}: unknown resize '{resize}' or interpolation '{interpolation}'")
        return cls(
            image_size=size,
            resize=resize,  # type: ignore[arg-type]
            crop_ratio=ratio,
            interpolation=interpolation,  # type: ignore[arg-type]
            mean=(mean[0], mean[1], mean[2]),
            std=(std[0], std[1], std[2]),
        )

    def difference(self, other: Preprocessing) -> str | None:
        """Name the first field in which ``other`` differs, as ``field a != b``; None when they are equal."""
        mine, theirs = self.to_fields(), other.to_fields()
        for name, value in mine.items():
            if value != theirs[name]:
                return f"{name} {value} != {theirs[name]}"
        return None
