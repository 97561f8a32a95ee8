"""The table: every loaded prompt set of a bundle stacked into one array per tensor, one slot each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vpdeploy.format.layout import Layout
from vpdeploy.format.promptset import CompiledPromptSet
from vpdeploy.format.tensorfile import Tensors

Sizes = dict[str, int]


class Table:
    """Host arrays of S slots, each of which holds one prompt set padded to the common sizes.

    Rows of different slots never share memory, so a slot that no request refers to may be rewritten while others are
    being read.

    Args:
        layout: The layout of one prompt set.
        sizes: The common sizes, e.g. ``{"prefix": 16, "classes": 10}``.
        slots: How many slots there are, S.

    Attributes:
        arrays: The arrays by tensor name, each [S, *shape of one prompt set's tensor at the common sizes].
    """

    def __init__(self, layout: Layout, sizes: Sizes, slots: int) -> None:
        self.layout = layout
        self.sizes = dict(sizes)
        self.slots = slots
        self.arrays: Tensors = {
            spec.name: np.full((slots, *spec.resolve(sizes)), spec.padding, dtype=spec.dtype) for spec in layout.tensors
        }

    @classmethod
    def of(cls, prompt_sets: Sequence[CompiledPromptSet]) -> Table:
        """Return the smallest table of prompt sets, one slot each, in their order.

        Args:
            prompt_sets: One prompt set or more, all of one layout.
        """
        table = cls(
            prompt_sets[0].layout, common_sizes([prompt_set.sizes() for prompt_set in prompt_sets]), len(prompt_sets)
        )
        for slot, prompt_set in enumerate(prompt_sets):
            table.write(slot, prompt_set)
        return table

    @property
    def size_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return self.size_bytes // self.slots

    def accepts(self, sizes: Sizes) -> bool:
        """Tell whether a prompt set of the given sizes fits into a slot."""
        return all(size <= self.sizes[name] for name, size in sizes.items())

    def write(self, slot: int, prompt_set: CompiledPromptSet) -> None:
        """Fill one slot: the prompt set's tensors, and padding up to the table's sizes."""
        for spec in self.layout.tensors:
            _write_padded(self.arrays[spec.name][slot], prompt_set.tensors[spec.name], spec.padding)

    def resized(self, sizes: Sizes, slots: int) -> Table:
        """Return a larger table with the same slots in the same places."""
        larger = Table(self.layout, sizes, slots)
        for spec in self.layout.tensors:
            for slot in range(self.slots):
                _write_padded(larger.arrays[spec.name][slot], self.arrays[spec.name][slot], spec.padding)
        return larger


def common_sizes(sizes: list[Sizes]) -> Sizes:
    """Return table sizes into which prompt sets of all the given sizes fit: the largest of each, and at least 1."""
    return {name: max(1, *(each[name] for each in sizes)) for name in sizes[0]}


def _write_padded(target: npt.NDArray[np.generic], source: npt.NDArray[np.generic], padding: float) -> None:
    """Copy ``source`` into the low corner of ``target`` and fill the rest with ``padding``."""
    target[...] = padding
    target[tuple(slice(size) for size in source.shape)] = source
