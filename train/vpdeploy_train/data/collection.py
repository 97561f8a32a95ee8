"""What a data format reads: labelled images by split, before there is a class map."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from vpdeploy_train.data.address import Address
from vpdeploy_train.data.example import Source

UNSPLIT: Final = "unsplit"
"""The one split of a collection whose format names none; it is divided when the data source is made."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Item:
    """One image and the name of its class.

    Attributes:
        source: Where the image comes from.
        class_name: The name of its class.
    """

    source: Source
    class_name: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Collection:
    """The labelled images of one spec.

    Attributes:
        splits: The images of ``train``, ``val`` and ``test`` where present, or of ``UNSPLIT`` alone.
        augmentation: Name of the augmentation that suits the images by default.
        labels: The class map, where the format has one; else it is made of the training images.
    """

    splits: Mapping[str, tuple[Item, ...]]
    augmentation: str
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Format:
    """A way to name a data set.

    Attributes:
        spelling: How its specs look, for messages.
        matches: Whether a spec is meant for this format.
        locate: Takes a spec of this format apart at the path in it; None where it names no place on this machine.
        read: Reads the spec's images; raises ``SpecError`` where they cannot be used.
        names: The specs of this format, where they are few and have fixed names.
    """

    spelling: str
    matches: Callable[[str], bool]
    locate: Callable[[str], Address | None]
    read: Callable[[str], Collection]
    names: tuple[str, ...] = ()
