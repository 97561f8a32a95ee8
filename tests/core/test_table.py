from __future__ import annotations

import numpy as np
from core import toy

from vpdeploy.format.layout import MASKED
from vpdeploy.table import Table, common_sizes


def test_a_slot_holds_its_prompt_set_and_padding():
    table = Table(toy.LAYOUT, {"prefix": 8, "classes": 6}, slots=2)
    prompt_set = toy.prompt_set(prefix=3, classes=4)
    table.write(1, prompt_set)
    np.testing.assert_array_equal(table.arrays["prefix_key"][1, :, :, :3], prompt_set.tensors["prefix_key"])
    np.testing.assert_array_equal(table.arrays["head_weight"][1, :, :4], prompt_set.tensors["head_weight"])
    assert (table.arrays["prefix_key"][1, :, :, 3:] == 0).all()
    assert (table.arrays["prefix_bias"][1, :, 3:] == MASKED).all()
    assert (table.arrays["head_bias"][1, 4:] == MASKED).all()
    assert (table.arrays["prefix_bias"][0] == MASKED).all()


def test_a_shorter_prompt_set_leaves_nothing_of_a_longer_one():
    used, fresh = (Table(toy.LAYOUT, {"prefix": 8, "classes": 6}, slots=1) for _ in range(2))
    used.write(0, toy.prompt_set(prefix=8, classes=6, seed=5))
    for table in (used, fresh):
        table.write(0, toy.prompt_set(prefix=0, classes=1))
    for name in fresh.arrays:
        np.testing.assert_array_equal(used.arrays[name], fresh.arrays[name])


def test_a_resized_table_equals_one_of_that_size_from_the_start():
    small, large = (
        Table(toy.LAYOUT, {"prefix": prefix, "classes": classes}, slots)
        for prefix, classes, slots in ((8, 4, 2), (16, 9, 5))
    )
    for slot in range(2):
        for table in (small, large):
            table.write(slot, toy.prompt_set(prefix=6 + slot, classes=3, seed=slot))
    resized = small.resized({"prefix": 16, "classes": 9}, 5)
    assert (resized.slots, resized.sizes) == (5, {"prefix": 16, "classes": 9})
    for name in large.arrays:
        np.testing.assert_array_equal(resized.arrays[name], large.arrays[name])
        assert not np.shares_memory(resized.arrays[name], small.arrays[name])


def test_bytes_of_a_table_and_of_a_slot():
    table = Table(toy.LAYOUT, {"prefix": 8, "classes": 6}, slots=3)
    numbers = 2 * toy.DEPTH * toy.WIDTH * 8 + toy.DEPTH * 8 + toy.WIDTH * 6 + 6
    assert table.slot_bytes == 4 * numbers
    assert table.size_bytes == 3 * 4 * numbers


def test_a_table_accepts_what_fits_every_size():
    table = Table(toy.LAYOUT, {"prefix": 8, "classes": 6}, slots=1)
    assert table.accepts({"prefix": 8, "classes": 6})
    assert not table.accepts({"prefix": 9, "classes": 1})
    assert not table.accepts({"prefix": 1, "classes": 7})


def test_common_sizes_are_the_largest_of_each():
    assert common_sizes([{"prefix": 15, "classes": 3}, {"prefix": 2, "classes": 9}]) == {"prefix": 15, "classes": 9}
    assert common_sizes([{"prefix": 8, "classes": 3}]) == {"prefix": 8, "classes": 3}


def test_without_prompts_the_table_still_has_columns():
    assert common_sizes([{"prefix": 0, "classes": 3}]) == {"prefix": 1, "classes": 3}


def test_the_table_of_prompt_sets_has_a_slot_for_each_and_the_largest_sizes():
    sets = [toy.prompt_set("a", prefix=3, classes=4), toy.prompt_set("b", prefix=5, classes=2, seed=1)]
    table = Table.of(sets)
    assert (table.slots, table.sizes) == (2, {"prefix": 5, "classes": 4})
    for slot, each in enumerate(sets):
        expected = Table(toy.LAYOUT, table.sizes, slots=2)
        expected.write(slot, each)
        for name, array in table.arrays.items():
            np.testing.assert_array_equal(array[slot], expected.arrays[name][slot])
