"""What a data set is to the rest of the trainer: labelled images in three splits, and one class map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from vpdeploy.errors import SpecError

SPLITS: Final = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """An encoded image that lies in a table, not in a file of its own.

    Attributes:
        name: What messages call it.
        read: Returns the encoded image; it can be pickled, as it travels to worker processes, and called from
            several threads. Raises ``InputError`` where there is none.
    """

    name: str
    read: Callable[[], bytes]


Source = Path | Record | npt.NDArray[np.uint8]
"""Where an image comes from: a file, a record, or RGB pixels, uint8 [H, W, 3], read-only."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One labelled image.

    Attributes:
        source: Where the image comes from.
        label: Index into the data source's ``labels``.
    """

    source: Source
    label: int


@dataclass(frozen=True, kw_only=True, eq=False)
class DataSource:
    """The images of one task.

    Attributes:
        spec: The spec it was resolved from.
        labels: The class names; an example's label is an index into them.
        train: The examples to learn from; empty only where a class map was given.
        val: The examples to choose settings on; never taken from ``test``. Empty where the spec asks for the
            final training, whose ``train`` they are part of.
        test: The examples to report on; empty where the data has none.
        augmentation: Name of the augmentation that suits the images by default: ``none`` or ``crop-flip``.
        carved: Those of ``val`` and ``test`` that the data did not name and that were drawn from the others.
    """

    spec: str
    labels: tuple[str, ...]
    train: tuple[Example, ...]
    val: tuple[Example, ...]
    test: tuple[Example, ...]
    augmentation: str
    carved: tuple[str, ...] = ()

    def split(self, name: str) -> tuple[Example, ...]:
        """Return the examples of the split ``train``, ``val`` or ``test``.

        Raises:
            SpecError: There is no such split, or it is empty; the message names the splits there are.
        """
        parts = {"train": self.train, "val": self.val, "test": self.test}
        present = [split for split, part in parts.items() if part]
        if name not in present:
            raise SpecError(
                f"{self.spec}: no split '{name}'; the splits with images are {', '.join(present) or 'none'}"
            )
        return parts[name]
