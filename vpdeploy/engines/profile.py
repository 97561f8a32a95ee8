"""How large each dynamic axis of an engine may be: smallest, tuned for, largest; asked for, or what the tasks need."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vpdeploy.errors import BundleCorruptError, SpecError
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.document import Document
from vpdeploy.format.interface import Binding
from vpdeploy.format.layout import (
    BATCH_AXIS,
    CLASS_AXIS,
    GENERATED_AXIS,
    HIDDEN_AXIS,
    PREFIX_AXIS,
    SLOT_AXIS,
    Layout,
)
from vpdeploy.table import Sizes, common_sizes


class AxisRange(NamedTuple):
    """The sizes that one axis may have; 1 <= ``smallest`` <= ``tuned`` <= ``largest``."""

    smallest: int
    tuned: int
    largest: int

    @classmethod
    def parse(cls, text: str, option: str) -> AxisRange:
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


BATCH = AxisRange(1, 8, 32)
"""Images in a batch where none were asked for."""

OPTIONS = {axis: f"--{axis}" for axis in (BATCH_AXIS, SLOT_AXIS, PREFIX_AXIS, GENERATED_AXIS, HIDDEN_AXIS, CLASS_AXIS)}
"""The option of ``vpdeploy build`` for each axis."""

_ROOM = {PREFIX_AXIS: 64, GENERATED_AXIS: 64, HIDDEN_AXIS: 64, CLASS_AXIS: 1024, SLOT_AXIS: 1024}
"""What every engine holds at least. Reserving costs scratch memory, not time: kernels are tuned for the middle size."""

_TUNED = {SLOT_AXIS: 64, CLASS_AXIS: 16, GENERATED_AXIS: 16, HIDDEN_AXIS: 16}
"""The size that kernels are tuned for at least."""

_PREFIX_STEP = 8  # powers of two would tune for columns that hardly any task has

_SAFE_ELEMENTS = 2**31 - 1
"""Elements of a tensor; more were refused before TensorRT 10.0.1, and some after it (NVIDIA/TensorRT issue 3815)."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Which sizes an engine takes: a range for each dynamic axis.

    A profile is built axis by axis, and completed with what a graph and its tasks need; no step changes it, each
    returns another::

        Profile().add("batch", AxisRange(1, 8, 32)).completed(artifact, present_sizes(artifact))

    Attributes:
        ranges: The range of each axis, by the axis names of ``vpdeploy.format.layout``.
    """

    ranges: Mapping[str, AxisRange] = field(default_factory=dict)

    @classmethod
    def parse(cls, asked: Mapping[str, str | None]) -> Profile:
        """Read what a user asks for; an axis without a text is left to ``completed``.

        Args:
            asked: ``MIN:OPT:MAX``, or one number for all three, by axis name.

        Raises:
            SpecError: A text is neither, or out of order; the message names the axis's option.
        """
        return cls(
            ranges={axis: AxisRange.parse(text, OPTIONS[axis]) for axis, text in asked.items() if text is not None}
        )

    def add(self, axis: str, sizes: AxisRange) -> Profile:
        """Return a profile with one more axis, or with another range for an axis that it has."""
        return Profile(ranges={**self.ranges, axis: sizes})

    def completed(self, artifact: Artifact, present: Sizes) -> Profile:
        """Return the ranges of all axes: those of this profile, else ones that fit the tasks and leave room for more.

        Args:
            artifact: The bundle or folded model whose graph is built.
            present: The sizes that its tasks need now, as ``present_sizes`` returns them.

        Raises:
            SpecError: A range is for an axis that the graph has not, or does not hold the present tasks.
        """
        layout = artifact.layout
        axes = () if layout is None else (SLOT_AXIS, *layout.axes)

        # A range for an axis that the graph has not would be without effect.
        for axis in self.ranges:
            if axis not in (BATCH_AXIS, *axes):
                what = "a folded model has only" if layout is None else "the bundle's graph has"
                known = ", ".join(OPTIONS[each] for each in (BATCH_AXIS, *axes))
                raise SpecError(f"{OPTIONS[axis]}: {what} {known}; leave it out")

        # What was asked for is taken as it is; every other axis holds the present tasks and some to come.
        profile = Profile().add(BATCH_AXIS, self.ranges.get(BATCH_AXIS, BATCH))
        for axis in axes:
            profile = profile.add(axis, self.ranges.get(axis) or _roomy(axis, present[axis]))

        # How many slots a tensor can have follows from the largest sizes of its other axes.
        if layout is not None and SLOT_AXIS not in self.ranges:
            profile = profile.add(SLOT_AXIS, _slot_range(layout, profile, present[SLOT_AXIS]))

        _check_fit(profile, present)
        return profile

    def __getitem__(self, axis: str) -> AxisRange:
        """Return the range of an axis that the profile has."""
        return self.ranges[axis]

    def __str__(self) -> str:
        return ", ".join(f"{axis} {each}" for axis, each in self.ranges.items())

    def shapes_of(self, binding: Binding) -> tuple[tuple[int, ...], ...]:
        """Return a tensor's smallest, tuned-for and largest shape."""
        return tuple(
            tuple(self[size][which] if isinstance(size, str) else size for size in binding.shape) for which in range(3)
        )

    def oversize(self, sizes: Mapping[str, int]) -> str | None:
        """Return the first axis whose size an engine cannot take, in words, or None if all fit.

        Args:
            sizes: By axis name, e.g. a table's ``{"prefix": 16, "classes": 10, "slots": 64}``; axes that the profile
                has not are ignored.
        """
        for axis, size in sizes.items():
            if axis in self.ranges and not self[axis].holds(size):
                return f"{axis} {size} is outside {self[axis]} (min:opt:max)"
        return None

    def to_fields(self) -> dict[str, Any]:
        """Return the fields of the JSON form: ``[min, opt, max]`` by axis."""
        return {axis: list(each) for axis, each in self.ranges.items()}

    @classmethod
    def from_document(cls, document: Document) -> Profile:
        """Read the JSON form.

        Raises:
            BundleCorruptError: An axis has no three numbers in order.
        """
        profile = cls()
        for axis in document.fields:
            numbers = document.take_list(axis, int)
            if len(numbers) != 3 or not AxisRange(*numbers).ordered:
                raise BundleCorruptError(f"{document.source}: '{axis}' should be [min, opt, max], found {numbers}")
            profile = profile.add(axis, AxisRange(*numbers))
        return profile


def present_sizes(artifact: Artifact) -> Sizes:
    """Return the sizes that a table of the bundle's tasks has now, ``slots`` included; empty for a folded model.

    Raises:
        BundleError: A task cannot be read.
    """
    if artifact.layout is None:
        return {}
    sizes = [artifact.read_prompt_set(task).sizes() for task in artifact.tasks]  # one at a time: there may be many
    least = dict.fromkeys(artifact.layout.axes, 1)
    return {**common_sizes([least, *sizes]), SLOT_AXIS: max(1, len(sizes))}


def _roomy(axis: str, present: int) -> AxisRange:
    """Return a range for what is there now, in coarse steps: a task more should not ask for another engine."""
    if axis == PREFIX_AXIS:
        tuned = -(-present // _PREFIX_STEP) * _PREFIX_STEP
        return AxisRange(1, tuned, max(_ROOM[axis], tuned))
    tuned = max(_TUNED.get(axis, 1), _power_of_two(present))
    return AxisRange(1, tuned, max(_ROOM[axis], tuned))


def _power_of_two(size: int) -> int:
    """Return the smallest power of two that is not below ``size``."""
    return 1 << (size - 1).bit_length()


def _slot_range(layout: Layout, profile: Profile, present: int) -> AxisRange:
    """Return the slots' range: more than there are tasks, as far as tensors stay within the safe size."""
    sizes = {axis: each.largest for axis, each in profile.ranges.items()}
    elements = max(math.prod(spec.resolve(sizes)) for spec in layout.tensors)  # of one slot's largest tensor
    possible = _SAFE_ELEMENTS // elements
    largest = max(present, min(max(_ROOM[SLOT_AXIS], _power_of_two(2 * present)), possible))
    return AxisRange(1, min(profile[SLOT_AXIS].tuned, largest), largest)


def _check_fit(profile: Profile, present: Sizes) -> None:
    for axis, size in present.items():
        # Fewer slots than a range's smallest are no obstacle for a table, which may be larger than it is full.
        if size > profile[axis].largest:
            raise SpecError(
                f"{OPTIONS[axis]} {profile[axis]}: the bundle's tasks need {size} already; give at least that as MAX"
            )
    if PREFIX_AXIS in profile.ranges and profile[PREFIX_AXIS].smallest > present[PREFIX_AXIS]:
        raise SpecError(
            f"{OPTIONS[PREFIX_AXIS]} {profile[PREFIX_AXIS]}: the bundle's table has {present[PREFIX_AXIS]} "
            "columns now; give at most that as MIN"
        )
