"""From all pictures of a source to the few of each split: seeded, with disjoint origins and no duplicates."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

LARGEST_SIDE = 112
"""Longest side of a stored image, in pixels."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """One labelled picture.

    Attributes:
        label: Its class.
        origin: What it was taken from; pictures of one origin never lie in two splits.
        load: Opens it: RGB, of any size.
    """

    label: str
    origin: str
    load: Callable[[], Image.Image]


Pools = Mapping[tuple[str, ...], Sequence[Picture]]
"""Pictures by the splits they may be divided among: ``("train", "val")`` keeps a published test split apart."""

Split = list[tuple[str, Image.Image]]


def draw_splits(pools: Pools, sizes: Mapping[str, int], seed: int) -> dict[str, Split]:
    """Draw the images of every split: at most so many, labelled, at most ``LARGEST_SIDE`` pixels.

    Every split has the classes' frequencies in the whole source, as far as its origins go: some sources' origins have
    one class, and a validation split of two of them would choose for another question. A picture whose pixels were
    drawn before is passed over; the test split is drawn first.

    Raises:
        ValueError: A class of ``val`` or ``test`` is missing in ``train``.
    """
    parts = {split: part for names, pictures in pools.items() for split, part in divide(names, pictures, sizes, seed)}
    seen: set[bytes] = set()
    labels = [picture.label for part in parts.values() for picture in part]
    shares = {label: labels.count(label) / len(labels) for label in sorted(set(labels))}
    drawn = {split: draw(parts[split], quotas(shares, sizes[split]), seen, seed) for split in ("test", "val", "train")}
    known = {label for label, _ in drawn["train"]}
    for split in ("val", "test"):
        if strangers := sorted({label for label, _ in drawn[split]} - known):
            raise ValueError(f"no training image of class '{strangers[0]}'; draw more training images")
    return drawn


def divide(
    names: tuple[str, ...], pictures: Sequence[Picture], sizes: Mapping[str, int], seed: int
) -> list[tuple[str, list[Picture]]]:
    """Divide pictures among splits in proportion to their sizes, whole origins at a time."""
    by_origin: dict[str, list[Picture]] = {}
    for picture in pictures:
        by_origin.setdefault(picture.origin, []).append(picture)
    parts: dict[str, list[Picture]] = {name: [] for name in names}
    origins = sorted(by_origin)
    for index in np.random.default_rng((seed, 1)).permutation(len(origins)):
        neediest = min(names, key=lambda name: len(parts[name]) / sizes[name])
        parts[neediest] += by_origin[origins[index]]
    return list(parts.items())


def quotas(shares: Mapping[str, float], count: int) -> dict[str, int]:
    """Divide a count among classes: the whole parts, then one each to the largest remainders."""
    whole = {label: int(share * count) for label, share in shares.items()}
    by_remainder = sorted(shares, key=lambda label: (whole[label] - shares[label] * count, label))
    for label in by_remainder[: count - sum(whole.values())]:
        whole[label] += 1
    return whole


def draw(pictures: Sequence[Picture], quota: Mapping[str, int], seen: set[bytes], seed: int) -> Split:
    """Draw up to so many pictures of each class in a seeded order, none whose pixels are in ``seen``, which grows."""
    drawn: Split = []
    left = dict(quota)
    for index in np.random.default_rng((seed, 2)).permutation(len(pictures)):
        if not left[pictures[index].label]:
            continue
        image = shrink(pictures[index].load())
        digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest()
        if digest not in seen:
            seen.add(digest)
            left[pictures[index].label] -= 1
            drawn.append((pictures[index].label, image))
    return drawn


def shrink(image: Image.Image) -> Image.Image:
    """Reduce an image to ``LARGEST_SIDE``; smaller ones are kept as they are."""
    if max(image.size) <= LARGEST_SIDE:
        return image
    scale = LARGEST_SIDE / max(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
