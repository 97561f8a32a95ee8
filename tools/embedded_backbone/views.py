"""Views: pictures laid out, cropped and changed at random, each from a seed of its own."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageOps

from tools.embedded_backbone.gallery import Gallery
from tools.embedded_backbone.packages import Bytes, Picture

SMALL: Final = 64
LARGE: Final = 112
CHUNK: Final = 2048
WHITE: Final = (255, 255, 255)

# Share of each source among the views. Fashion and animals are 28-pixel grey images: enough, but not the most.
SHARES: Final = {
    "clipart": 0.22,
    "emoji": 0.18,
    "collage": 0.18,
    "photos": 0.16,
    "fashion": 0.10,
    "animals": 0.08,
    "satellite": 0.08,
}


def draw_views(gallery: Gallery, seed: int, start: int) -> tuple[Bytes, Bytes]:
    """Draw views ``start`` to ``start + CHUNK``: (n, 112, 112, 3) and (n, 64, 64, 3), each from its own seed."""
    large = np.empty((CHUNK, LARGE, LARGE, 3), np.uint8)
    small = np.empty((CHUNK, SMALL, SMALL, 3), np.uint8)
    for row in range(CHUNK):
        rng = np.random.default_rng((seed, start + row))
        picture = change_look(draw_original(gallery, rng), rng)
        large[row], small[row] = np.asarray(picture), shrink(picture)
    return large, small


def draw_original(gallery: Gallery, rng: Generator) -> Picture:
    """Draw one 112-pixel picture of one of the sources, before its colours are changed."""
    source = str(rng.choice(list(SHARES), p=list(SHARES.values())))
    if source == "collage":
        return draw_collage(gallery, rng)
    if source in gallery.cutouts:
        canvas = draw_background(gallery, rng)
        lay_cutout(canvas, pick(gallery.cutouts[source], rng), int(rng.integers(72, LARGE + 1)), rng)
        return crop_randomly(canvas, 0.4, 1.0, rng)
    picture = pick(gallery.wholes[source], rng)
    if source == "satellite":
        return crop_randomly(crop_landscape(picture, rng), 0.6, 1.0, rng)
    return crop_randomly(picture, *((0.03, 0.8) if source == "photos" else (0.35, 1.0)), rng)


def change_look(picture: Picture, rng: Generator) -> Picture:
    """Mirror, invert, grey, relight or coarsen a picture, each with its own chance."""
    if rng.random() < 0.5:
        picture = ImageOps.mirror(picture)
    if rng.random() < 0.2:
        picture = ImageOps.invert(picture)
    if rng.random() < 0.2:
        picture = picture.convert("L").convert("RGB")
    if rng.random() < 0.5:
        levels = np.asarray(picture, np.float32) * rng.uniform(0.6, 1.3, 3) + rng.uniform(-40, 40)
        picture = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    if rng.random() < 0.2:
        side = int(rng.integers(8, 33))
        picture = picture.resize((side, side), Image.Resampling.BOX).resize((LARGE, LARGE), Image.Resampling.BICUBIC)
    return picture


def shrink(picture: Picture) -> Bytes:
    """Resize a picture to the student's (64, 64, 3)."""
    return np.asarray(picture.resize((SMALL, SMALL), Image.Resampling.BICUBIC), np.uint8)


def draw_collage(gallery: Gallery, rng: Generator) -> Picture:
    """Draw one to eight small cutouts on one background."""
    canvas = draw_background(gallery, rng)
    same = pick(gallery.cutouts["emoji"], rng) if rng.random() < 0.4 else None
    for _ in range(int(rng.integers(1, 9))):
        cutout = same or pick(gallery.cutouts[("emoji", "clipart")[int(rng.integers(2))]], rng)
        lay_cutout(canvas, cutout, int(rng.integers(14, 48)), rng)
    return canvas


def draw_background(gallery: Gallery, rng: Generator) -> Picture:
    """Draw what a cutout is laid on: white, a colour, or a blurred piece of a photo."""
    kind = rng.random()
    if kind < 0.75:
        return Image.new("RGB", (LARGE, LARGE), WHITE if kind < 0.3 else draw_colour(rng))
    return crop_randomly(pick(gallery.wholes["photos"], rng), 0.02, 0.5, rng)


def lay_cutout(canvas: Picture, cutout: Picture, side: int, rng: Generator) -> None:
    """Paste ``cutout``, scaled to ``side`` pixels, at a random place of ``canvas``."""
    scale = side / max(cutout.size)
    width, height = (max(1, round(length * scale)) for length in cutout.size)
    layer = cutout.resize((width, height), Image.Resampling.BICUBIC)
    place = int(rng.integers(LARGE - width + 1)), int(rng.integers(LARGE - height + 1))
    canvas.paste(layer, place, layer)


def crop_randomly(picture: Picture, smallest: float, largest: float, rng: Generator) -> Picture:
    """Cut out a box of ``smallest`` to ``largest`` of the area, aspect 3/4 to 4/3, and resize it to 112 pixels."""
    width, height = picture.size
    area = width * height * rng.uniform(smallest, largest)
    aspect = float(np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3))))
    box_width, box_height = min(width, (area * aspect) ** 0.5), min(height, (area / aspect) ** 0.5)
    left, top = rng.uniform(0, width - box_width), rng.uniform(0, height - box_height)
    box = (left, top, left + box_width, top + box_height)
    return picture.resize((LARGE, LARGE), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)


def crop_landscape(picture: Picture, rng: Generator) -> Picture:
    """Cut 112 pixels out of a large image at full to an eighth resolution; of four tries the least uniform."""
    tries = []
    for _ in range(4):
        side = int(min(picture.size) * np.exp(rng.uniform(np.log(0.04), np.log(0.35))))
        left, top = (int(rng.integers(length - side)) for length in picture.size)
        tries.append(picture.crop((left, top, left + side, top + side)))
    return max(tries, key=lambda crop: float(np.asarray(crop.resize((16, 16))).std()))


def pick(pictures: list[Picture], rng: Generator) -> Picture:
    """Pick one picture."""
    return pictures[int(rng.integers(len(pictures)))]


def draw_colour(rng: Generator) -> tuple[int, int, int]:
    """Draw any RGB colour."""
    red, green, blue = (int(value) for value in rng.integers(0, 256, 3))
    return red, green, blue
