"""Images that are in a data set more than once, byte for byte: in two splits, or with two labels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from vpdeploy.errors import InputError
from vpdeploy_train.data.example import SPLITS, DataSource, Example, Record, Source

_HEAD_BYTES: Final = 1 << 16
_CHUNK_BYTES: Final = 1 << 20
_NAMED: Final = 3

Numbers = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class Copies:
    """What is in a data set more than once.

    Attributes:
        within_train: Training images that are copies of earlier ones.
        across: By two splits, the images of the second that are in the first, too: their number, and the first pairs.
        conflicts: Training images whose copy has another label: their number, and the first pairs with their labels.
        carved: The splits that were drawn from others.
    """

    within_train: int
    across: dict[tuple[str, str], tuple[int, tuple[str, ...]]]
    conflicts: tuple[int, tuple[str, ...]]
    carved: tuple[str, ...]

    def remarks(self) -> list[str]:
        """Return what to warn of, a line each."""
        lines = []
        for (first, second), (count, pairs) in self.across.items():
            if count:
                whose = f"{count} images of {second} are" if count > 1 else f"1 image of {second} is"
                advice = "remove the copies, as chance divides them" if second in self.carved else "remove the copies"
                lines.append(
                    f"{whose} in {first}, too, byte for byte, so results on {second} are better than on new images: "
                    f"{advice}: {_listed(pairs, count)}"
                )
        count, pairs = self.conflicts
        if count:
            whose = f"{count} training images have" if count > 1 else "1 training image has"
            lines.append(f"{whose} a copy with another label: keep the right one: {_listed(pairs, count)}")
        if self.within_train:
            many = self.within_train > 1
            lines.append(
                f"{self.within_train} training images are copies of others" if many else "1 training image is a copy"
            )
        return lines

    def to_json(self) -> dict[str, int]:
        """Return the JSON form."""
        across = {f"{first}_{second}": count for (first, second), (count, _) in self.across.items()}
        return {"train": self.within_train, **across, "other_label": self.conflicts[0]}


def find_copies(source: DataSource, *, on_progress: Callable[[int, int], None] = lambda done, total: None) -> Copies:
    """Compare the images of all splits by digests of their bytes.

    Files are compared by size first; of those that share it, the first 64 KiB are compared, and the rest of those that
    share that. Images that cannot be read are left out. Memory is some bytes an image.

    Args:
        source: The images.
        on_progress: Called with the number of steps done and of all steps.
    """
    places = [(split, example) for split in SPLITS for example in getattr(source, split)]
    steps = 2 * len(places)
    sizes, keys = _measure([example.source for _, example in places], lambda done: on_progress(done, steps))

    # Narrow down who may be equal: by size, by the beginning, by everything.
    suspects = _repeated(np.flatnonzero(sizes > 0), sizes.astype(np.uint64))
    for index in suspects.tolist():
        file = places[index][1].source
        if isinstance(file, Path):
            keys[index] = _digest(file, _HEAD_BYTES)
        on_progress(len(places) + index, steps)
    suspects = _repeated(suspects, keys ^ sizes.astype(np.uint64))
    for index in suspects.tolist():
        file = places[index][1].source
        if isinstance(file, Path) and sizes[index] > _HEAD_BYTES:
            keys[index] = _digest(file, None)
    suspects = _repeated(suspects, keys)

    # Sort out what the equal ones are to each other.
    found = _Findings()
    for group in _groups(suspects, keys):
        found.add([(index, *places[index]) for index in group.tolist() if keys[index]], source.labels)
    return Copies(within_train=found.within_train, across=found.across, conflicts=found.conflicts, carved=source.carved)


class _Findings:
    """What groups of equal images add up to."""

    def __init__(self) -> None:
        self.within_train = 0
        self.across: dict[tuple[str, str], tuple[int, tuple[str, ...]]] = {
            (first, second): (0, ()) for number, first in enumerate(SPLITS) for second in SPLITS[number + 1 :]
        }
        self.conflicts: tuple[int, tuple[str, ...]] = (0, ())

    def add(self, group: Sequence[tuple[int, str, Example]], labels: Sequence[str]) -> None:
        """Take in the equal images of one group."""
        members = {split: [(index, each) for index, of, each in group if of == split] for split in SPLITS}
        for (first, second), (count, pairs) in self.across.items():
            if members[first] and members[second]:
                (left, one), (right, other) = members[first][0], members[second][0]
                pair = f"{_name(one.source, left)} = {_name(other.source, right)}"
                self.across[first, second] = (count + len(members[second]), (*pairs, pair)[:_NAMED])
        train = members["train"]
        self.within_train += max(len(train) - 1, 0)
        others = [(index, each) for index, each in train if each.label != train[0][1].label]
        if others:
            (left, one), (right, other) = train[0], others[0]
            pair = (
                f"{_name(one.source, left)} '{labels[one.label]}' = {_name(other.source, right)} "
                f"'{labels[other.label]}'"
            )
            count, pairs = self.conflicts
            self.conflicts = (count + len(others), (*pairs, pair)[:_NAMED])


def _measure(sources: Sequence[Source], on_progress: Callable[[int], None]) -> tuple[Numbers, Keys]:
    """Return the size of each image in bytes, 0 where it cannot be read, and the digests of those that are no files."""
    sizes, keys = np.zeros(len(sources), np.int64), np.zeros(len(sources), np.uint64)
    for index, source in enumerate(sources):
        if isinstance(source, Path):
            try:
                sizes[index] = source.stat().st_size
            except OSError:
                continue
        elif isinstance(source, Record):
            try:
                encoded = source.read()
            except InputError:
                continue
            sizes[index], keys[index] = len(encoded), _number(hashlib.blake2b(encoded, digest_size=8))
        else:
            digest = hashlib.blake2b(str(source.shape).encode(), digest_size=8)
            digest.update(source.tobytes())
            sizes[index], keys[index] = source.nbytes, _number(digest)
        on_progress(index)
    return sizes, keys


def _digest(path: Path, limit: int | None) -> int:
    """Return a digest of a file's bytes, or of so many of them; 0 where it cannot be read."""
    digest = hashlib.blake2b(digest_size=8)
    try:
        with path.open("rb", buffering=0) as stream:
            if limit is not None:
                digest.update(stream.read(limit))
            else:
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
    except OSError:
        return 0
    return _number(digest)


def _number(digest: hashlib.blake2b) -> int:
    return int.from_bytes(digest.digest(), "little")


def _repeated(indices: Numbers, keys: Keys) -> Numbers:
    """Return those of some indices, in order, whose key another one has, too."""
    _, inverse, counts = np.unique(keys[indices], return_inverse=True, return_counts=True)
    repeated: Numbers = indices[counts[inverse] > 1]
    return repeated


def _groups(indices: Numbers, keys: Keys) -> Iterator[Numbers]:
    """Yield the indices that share a key, in the order of the first of each."""
    if not len(indices):
        return
    order = indices[np.argsort(keys[indices], kind="stable")]
    ends = np.flatnonzero(np.diff(keys[order])) + 1
    yield from sorted(np.split(order, ends), key=lambda group: int(group[0]))


def _name(source: Source, index: int) -> str:
    """Return what messages call an image."""
    if isinstance(source, Path):
        return str(source)
    return source.name if isinstance(source, Record) else f"image {index}"


def _listed(pairs: Sequence[str], count: int) -> str:
    return "; ".join(" ".join(pair.split()) for pair in pairs) + ("; ..." if count > len(pairs) else "")
