"""Drawn pictures whose label is a number, a place or a direction."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from tools.embedded_backbone.packages import Picture
from tools.embedded_backbone.views import draw_colour


def draw_count(rng: Generator) -> tuple[Picture, int]:
    """Draw one to six separate discs; the label is how many."""
    canvas, pen, ink = draw_canvas(rng)
    count = int(rng.integers(1, 7))
    # One disc to a cell of a 4x4 grid, so that none hide others.
    for cell in rng.permutation(16)[:count]:
        radius = rng.uniform(11, 22)
        x, y = (56 * part + rng.uniform(24, 32) for part in divmod(int(cell), 4))
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)
    return canvas, count - 1


def draw_location(rng: Generator) -> tuple[Picture, int]:
    """Draw one square or disc in a 4x4 grid; the label is the cell its middle is in."""
    canvas, pen, ink = draw_canvas(rng)
    cell, half = int(rng.integers(16)), rng.uniform(12, 30)
    x, y = (56 * part + rng.uniform(4, 52) for part in divmod(cell, 4))
    shape = pen.ellipse if rng.random() < 0.5 else pen.rectangle
    shape((x - half, y - half, x + half, y + half), fill=ink)
    return canvas, cell


def draw_orientation(rng: Generator) -> tuple[Picture, int]:
    """Draw a thick line through a point near the middle; the label is its angle in eighths of a half turn."""
    canvas, pen, ink = draw_canvas(rng)
    label = int(rng.integers(8))
    angle = np.pi * (label + rng.uniform(-0.3, 0.3)) / 8
    x, y = rng.uniform(80, 144, 2)
    dx, dy = np.array([np.cos(angle), np.sin(angle)]) * rng.uniform(40, 75)
    pen.line((x - dx, y - dy, x + dx, y + dy), fill=ink, width=int(rng.integers(8, 20)))
    return canvas, label


def draw_canvas(rng: Generator) -> tuple[Picture, ImageDraw.ImageDraw, tuple[int, int, int]]:
    """Draw an empty 224-pixel canvas and choose a colour that can be seen on it."""
    ground = draw_colour(rng)
    ink = draw_colour(rng)
    while sum(abs(a - b) for a, b in zip(ground, ink, strict=True)) < 200:
        ink = draw_colour(rng)
    canvas = Image.new("RGB", (224, 224), ground)
    return canvas, ImageDraw.Draw(canvas), ink
