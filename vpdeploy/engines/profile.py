"""How large each dynamic axis of an engine may be: smallest, tuned for, largest; asked for, or what the tasks need."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from vpdeploy.artifact import Artifact
from vpdeploy.document import Document
from vpdeploy.errors import BundleCorruptError, SpecError
from vpdeploy.interface import Binding
from vpdeploy.layout import (
    BATCH_AXIS,
    CLASS_AXIS,
    GENERATED_AXIS,
    HIDDEN_AXIS,
    PREFIX_AXIS,
    SLOT_AXIS,
)
from vpdeploy.table import Sizes, common_sizes


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


BATCH = Range(1, 8, 32)

_ROOM = {PREFIX_AXIS: 64, GENERATED_AXIS: 64, HIDDEN_AXIS: 64, CLASS_AXIS: 1024, SLOT_AXIS: 1024}
"""What every engine holds at least. Reserving costs scratch memory, not time: kernels are tuned for the middle size."""

_TUNED = {SLOT_AXIS: 64, CLASS_AXIS: 16, GENERATED_AXIS: 16, HIDDEN_AXIS: 16}

_PREFIX_STEP = 8  # powers of two would tune for columns that hardly any task has

_SAFE_ELEMENTS = 2**31 - 1
"""Of one tensor. Larger ones were refused before TensorRT 10.0.1, and some after it (NVIDIA/TensorRT issue 3815)."""

OPTIONS = {axis: f"--{axis}" for axis in (BATCH_AXIS, SLOT_AXIS, PREFIX_AXIS, GENERATED_AXIS, HIDDEN_AXIS, CLASS_AXIS)}
"""The option of ``vpdeploy build`` for each axis."""


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


def choose_profile(artifact: Artifact, asked: Profile, present: Sizes) -> Profile:
    """Return the ranges of all axes: those asked for, else ones that fit the present tasks and leave room.

    Args:
        artifact: What is built.
        asked: By axis.
        present: As ``present_sizes`` returns them.

    Raises:
        SpecError: A range is for an axis that the graph has not, or does not hold the present tasks.
    """
    axes = () if artifact.layout is None else (SLOT_AXIS, *artifact.layout.axes)
    for axis in asked:
        if axis not in (BATCH_AXIS, *axes):
            what = "a folded model has only" if artifact.layout is None else "the bundle's graph has"
            known = ", ".join(OPTIONS[each] for each in (BATCH_AXIS, *axes))
            raise SpecError(f"{OPTIONS[axis]}: {what} {known}; leave it out")
    profile = {BATCH_AXIS: asked.get(BATCH_AXIS, BATCH)}
    for axis in axes:
        profile[axis] = asked.get(axis) or _roomy(axis, present[axis])
    if artifact.layout is not None and SLOT_AXIS not in asked:
        profile[SLOT_AXIS] = _slot_range(artifact, profile, present[SLOT_AXIS])
    _check_fit(profile, present)
    return profile


def shapes_of(binding: Binding, profile: Profile) -> tuple[tuple[int, ...], ...]:
    """Return a tensor's smallest, tuned-for and largest shape."""
    return tuple(
        tuple(profile[size][which] if isinstance(size, str) else size for size in binding.shape) for which in range(3)
    )


def _roomy(axis: str, present: int) -> Range:
    """Return a range for what is there now, in coarse steps: a task more should not ask for another engine."""
    if axis == PREFIX_AXIS:
        tuned = -(-present // _PREFIX_STEP) * _PREFIX_STEP
        return Range(1, tuned, max(_ROOM[axis], tuned))
    tuned = max(_TUNED.get(axis, 1), _power_of_two(present))
    return Range(1, tuned, max(_ROOM[axis], tuned))


def _power_of_two(size: int) -> int:
    """Return the smallest power of two that is not below ``size``."""
    return 1 << (size - 1).bit_length()


def _slot_elements(artifact: Artifact, profile: Profile) -> int:
    """Return the elements of the largest tensor of one slot at the profile's largest sizes."""
    sizes = {axis: each.largest for axis, each in profile.items()}
    specs = artifact.layout.tensors if artifact.layout is not None else ()
    return max((math.prod(spec.resolve(sizes)) for spec in specs), default=1)


def _slot_range(artifact: Artifact, profile: Profile, present: int) -> Range:
    """Return the slots' range: more than there are tasks, as far as tensors stay within the safe size."""
    possible = _SAFE_ELEMENTS // _slot_elements(artifact, profile)
    largest = max(present, min(max(_ROOM[SLOT_AXIS], _power_of_two(2 * present)), possible))
    return Range(1, min(profile[SLOT_AXIS].tuned, largest), largest)


def _check_fit(profile: Profile, present: Sizes) -> None:
    for axis, size in present.items():
        # Fewer slots than a range's smallest are no obstacle for a table, which may be larger than it is full.
        if size > profile[axis].largest:
            raise SpecError(
                f"{OPTIONS[axis]} {profile[axis]}: the bundle's tasks need {size} already; give at least that as MAX"
            )
    if PREFIX_AXIS in profile and profile[PREFIX_AXIS].smallest > present[PREFIX_AXIS]:
        raise SpecError(
            f"{OPTIONS[PREFIX_AXIS]} {profile[PREFIX_AXIS]}: the bundle's table has {present[PREFIX_AXIS]} "
            "columns now; give at most that as MIN"
        )
