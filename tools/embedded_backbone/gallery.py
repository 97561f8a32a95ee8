"""The pictures that the student learns from, without those that probes are tested on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image

from tools.embedded_backbone.packages import (
    Folders,
    Labels,
    Picture,
    read_animals,
    read_clipart,
    read_emoji,
    read_fashion,
    read_satellite,
    to_pictures,
)

HELD_OUT: Final = 700
PHOTOS: Final = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "retina.jpg",
    "rocket.jpg",
)


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """The pictures that views are drawn from: ``cutouts`` have transparency, the others are whole images."""

    cutouts: dict[str, list[Picture]]
    wholes: dict[str, list[Picture]]


def open_gallery(folders: Folders, seed: int) -> Gallery:
    """Read all training pictures; the held-out emoji, silhouettes and garments are not among them."""
    emoji = []
    for vendor in ("google", "twitter"):
        pictures, _, digits = read_emoji(folders.emoji, vendor)
        train, _ = split_held_out(len(pictures), seed)
        emoji += [pictures[i] for i in train if not digits[i]]
    animals, _ = read_animals(folders.python)
    train, _ = split_held_out(len(animals), seed)
    return Gallery(
        cutouts={"emoji": emoji, "clipart": read_clipart(folders.clipart)},
        wholes={
            "fashion": to_pictures(read_fashion(folders.fashion, "train")[0]),
            "animals": to_pictures(animals[train]),
            "photos": [Image.open(folders.photos / name).convert("RGB") for name in PHOTOS],
            "satellite": [read_satellite(folders.python)],
        },
    )


def split_held_out(count: int, seed: int) -> tuple[Labels, Labels]:
    """Split ``count`` items into training indices and ``HELD_OUT`` indices that only probes test on."""
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[HELD_OUT:]), np.sort(order[:HELD_OUT])
