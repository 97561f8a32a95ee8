"""Drawing shapes on noisy, textured backgrounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from vpdeploy.errors import MissingExtraError

SIDE: Final = 64
"""Height and width of a drawn image, in pixels."""

_SCALE = 4  # shapes are drawn this much larger and averaged down: smooth edges

Outline = Sequence[tuple[float, float]]
"""Corners of a shape around the origin, within a circle of radius 1; the shape faces along +x."""


def _star(points: int, inner: float) -> Outline:
    """Return a star's outline, or a regular polygon's where the inner radius is 1."""
    return [
        (radius * math.cos(angle), radius * math.sin(angle))
        for step in range(2 * points)
        for radius, angle in [((1.0, inner)[step % 2], math.pi * step / points)]
    ]


OUTLINES: Final[Mapping[str, Outline]] = {
    "disc": _star(20, 1.0),
    "square": _star(2, 1.0),
    "triangle": _star(3, 0.5),
    "star": _star(5, 0.45),
    "cross": [
        (x * sign_x, y * sign_y)
        for sign_x, sign_y, corners in [
            (1, 1, [(1, 0.33), (0.33, 0.33), (0.33, 1)]),
            (-1, 1, [(0.33, 1), (0.33, 0.33), (1, 0.33)]),
            (-1, -1, [(1, 0.33), (0.33, 0.33), (0.33, 1)]),
            (1, -1, [(0.33, 1), (0.33, 0.33), (1, 0.33)]),
        ]
        for x, y in corners
    ],
}
"""The shapes without a direction."""


class Canvas:
    """One image in the making: a background, shapes that stand out from it, and noise over all of it.

    Args:
        generator: Decides everything that is drawn at random.

    Raises:
        MissingExtraError: Pillow is not installed.
    """

    def __init__(self, generator: np.random.Generator) -> None:
        try:
            from PIL import Image
        except ModuleNotFoundError:
            raise MissingExtraError("PIL", "train") from None
        self.generator = generator
        self._base = generator.uniform(50, 205, size=3).astype(np.float32)
        self._background = self._draw_background()
        # Colours on black: averaged down, they are already weighted by the opacity.
        self._colours = Image.new("RGB", (SIDE * _SCALE, SIDE * _SCALE))
        self._opacity = Image.new("L", (SIDE * _SCALE, SIDE * _SCALE))

    def draw(self, outline: Outline, centre: tuple[float, float], radius: float, angle: float) -> None:
        """Draw a filled shape in a colour that differs clearly from the background.

        Args:
            outline: The shape's corners.
            centre: Its x and y, in pixels.
            radius: Its radius, in pixels.
            angle: The direction it faces, in radians, clockwise from +x.
        """
        from PIL import ImageDraw

        cosine, sine = math.cos(angle) * radius, math.sin(angle) * radius
        corners = [
            (_SCALE * (centre[0] + cosine * x - sine * y), _SCALE * (centre[1] + sine * x + cosine * y))
            for x, y in outline
        ]
        red, green, blue = (int(value) for value in self._pick_colour())
        ImageDraw.Draw(self._colours).polygon(corners, fill=(red, green, blue))
        ImageDraw.Draw(self._opacity).polygon(corners, fill=255)

    def arrow_outline(self) -> Outline:
        """Return an arrow that points along +x, with a shaft and head of random proportions."""
        shaft, head = self.generator.uniform(0.12, 0.2), self.generator.uniform(0.55, 0.8)
        neck = self.generator.uniform(-0.1, 0.2)
        upper = [(1.0, 0.0), (neck, head), (neck, shaft), (-0.95, shaft)]
        return [*upper, *[(x, -y) for x, y in reversed(upper[1:])]]

    def to_pixels(self) -> npt.NDArray[np.uint8]:
        """Return the image with noise over it: uint8 [64, 64, 3], read-only, owned by the caller."""
        colours = np.asarray(self._colours.reduce(_SCALE), dtype=np.float32)
        opacity = np.asarray(self._opacity.reduce(_SCALE), dtype=np.float32)[..., None] / 255
        image = self._background * (1 - opacity) + colours
        deviation = np.float32(self.generator.uniform(2, 9))
        image += deviation * self.generator.standard_normal(image.shape, dtype=np.float32)
        pixels = np.clip(image + 0.5, 0, 255).astype(np.uint8)
        pixels.flags.writeable = False
        return pixels

    def _draw_background(self) -> npt.NDArray[np.float32]:
        """Return a base colour with blotches and stripes of a random scale, float32 [64, 64, 3]."""
        from PIL import Image

        cells = int(self.generator.integers(3, 17))
        blotches = self.generator.standard_normal((cells, cells), dtype=np.float32)
        texture = np.asarray(Image.fromarray(blotches).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        direction, wavelength = self.generator.uniform(0, math.pi), self.generator.uniform(5, 30)
        across = np.arange(SIDE, dtype=np.float32)
        along = across * math.cos(direction) + across[:, None] * math.sin(direction)
        stripes = np.sin(2 * math.pi * along / wavelength + self.generator.uniform(0, 2 * math.pi))
        tints = self.generator.uniform(-14, 14, size=(2, 3)).astype(np.float32)
        tinted = texture[..., None] * tints[0] + stripes[..., None] * tints[1]
        return np.asarray(self._base + tinted, dtype=np.float32)

    def _pick_colour(self) -> npt.NDArray[np.float64]:
        """Return a colour far from the background's base, float64 [3]."""
        while True:
            colour = self.generator.uniform(0, 255, size=3)
            if np.linalg.norm(colour - self._base) > 150:
                return colour
