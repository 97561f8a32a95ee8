"""The tasks of stage 4: an unseen domain, held-out rows of seen domains, and drawings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from tools.embedded_backbone.drawings import draw_count, draw_location, draw_orientation
from tools.embedded_backbone.gallery import HELD_OUT, split_held_out
from tools.embedded_backbone.packages import (
    Bytes,
    Folders,
    Labels,
    Picture,
    read_animals,
    read_emoji,
    read_fashion,
    to_pictures,
)
from tools.embedded_backbone.views import LARGE, WHITE, shrink

PROBE_TRAIN: Final = 1000


@dataclass(frozen=True, kw_only=True)
class ProbeTask:
    """One probe: images at both sizes, (n, size, size, 3) uint8; the first 1,000 train, the rest test."""

    name: str
    large: Bytes
    small: Bytes
    labels: Labels


def build_tasks(folders: Folders, seed: int) -> Iterator[ProbeTask]:
    """Build the probes: unseen domain, held-out rows of seen domains, and drawings."""
    digits = load_digits()
    rows = order_probe(len(digits.target), seed)
    yield collect("digits", to_pictures((digits.images[rows] * 15.9375).astype(np.uint8)), digits.target[rows])
    garments, labels = read_fashion(folders.fashion, "t10k")
    rows = order_probe(len(labels), seed)
    yield collect("garments", to_pictures(garments[rows]), labels[rows])
    animals, labels = read_animals(folders.python)
    rows = order_partly_seen(len(labels), seed)
    yield collect("silhouettes", to_pictures(animals[rows]), labels[rows])
    emoji, labels, _ = read_emoji(folders.emoji, "google")
    rows = order_partly_seen(len(labels), seed)
    white = Image.new("RGBA", (64, 64), WHITE)
    flat = [Image.alpha_composite(white.resize(emoji[i].size), emoji[i]).convert("RGB") for i in rows]
    yield collect("emoji", flat, labels[rows])
    for name, draw in (("count", draw_count), ("location", draw_location), ("orientation", draw_orientation)):
        drawn = [draw(np.random.default_rng((seed, 10**6 + i))) for i in range(PROBE_TRAIN + HELD_OUT)]
        yield collect(name, [picture for picture, _ in drawn], np.array([label for _, label in drawn]))


def collect(name: str, pictures: list[Picture], labels: Labels) -> ProbeTask:
    """Resize pictures, train rows first, to both sizes."""
    sized = [picture.resize((LARGE, LARGE), Image.Resampling.BICUBIC) for picture in pictures]
    return ProbeTask(
        name=name,
        large=np.stack([np.asarray(picture) for picture in sized]),
        small=np.stack([shrink(picture) for picture in pictures]),
        labels=np.asarray(labels),
    )


def order_probe(count: int, seed: int) -> Labels:
    """Choose 1,000 training and 700 test rows of a data set that the backbone never saw."""
    return np.random.default_rng(seed).permutation(count)[: PROBE_TRAIN + HELD_OUT]


def order_partly_seen(count: int, seed: int) -> Labels:
    """Choose 1,000 rows to train the probe, then the 700 rows that the backbone never saw to test it."""
    train, test = split_held_out(count, seed)
    return np.concatenate([np.random.default_rng(seed).permutation(train)[:PROBE_TRAIN], test])
