"""How large each dynamic axis of an engine may be: smallest, tuned for, largest."""

from __future__ import annotations

from typing import Any, NamedTuple

from vpdeploy.document import Document
from vpdeploy.errors import BundleCorruptError, SpecError


class Range(NamedTuple):
    """Sizes of one axis; 1 <= ``smallest`` <= ``tuned`` <= ``largest``."""

    smallest: int
    tuned: int
    largest: int

    @classmethod
    def parse(cls, text: str, option: str) -> Range:
        """Read ``MIN:OPT:MAX``, or one number for all three.

        Raises:
            SpecError: It is neither, or out of order.
        """
        try:
            numbers = [int(part) for part in text.split(":")]
        except ValueError:
            numbers = []
        if len(numbers) == 1:
            numbers *= 3
        if len(numbers) != 3:
            raise SpecError(f"{option} {text}: expected MIN:OPT:MAX or one number, e.g. 1:8:32")
        found = cls(*numbers)
        if not found.ordered:
            raise SpecError(f"{option} {text}: expected 1 <= MIN <= OPT <= MAX")
        return found

    @property
    def ordered(self) -> bool:
        """Tell whether the three are in order and positive."""
        return 1 <= self.smallest <= self.tuned <= self.largest

    def holds(self, size: int) -> bool:
        """Tell whether an axis may have this size."""
        return self.smallest <= size <= self.largest

    def __str__(self) -> str:
        return ":".join(map(str, self))


Profile = dict[str, Range]
"""Ranges by the axis names of ``vpdeploy.layout``."""


def profile_fields(profile: Profile) -> dict[str, Any]:
    """Return the fields of the JSON form."""
    return {axis: list(each) for axis, each in profile.items()}


def profile_from_document(document: Document) -> Profile:
    """Read the JSON form.

    Raises:
        BundleCorruptError: An axis has no three numbers in order.
    """
    profile: Profile = {}
    for axis in document.fields:
        numbers = document.take_list(axis, int)
        if len(numbers) != 3 or not Range(*numbers).ordered:
            raise BundleCorruptError(f"{document.source}: '{axis}' should be [min, opt, max], found {numbers}")
        profile[axis] = Range(*numbers)
    return profile
