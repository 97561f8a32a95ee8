from __future__ import annotations

import pytest

from vpdeploy.text import align, column_widths

ROWS = [("task", "images", ""), ("birds", "9", "MISSED"), ("a", "1000000", "")]


def test_columns_are_as_wide_as_their_longest_cell():
    assert column_widths(ROWS) == [5, 7, 6]


def test_text_stands_to_the_left_and_numbers_to_the_right():
    assert align(ROWS, left=(0, 2)) == [
        "task    images",
        "birds        9  MISSED",
        "a      1000000",
    ]


def test_rows_of_unequal_length_are_no_table():
    with pytest.raises(ValueError, match="zip"):
        align([("a", "b"), ("c",)])
