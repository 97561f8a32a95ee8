from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from vpdeploy.text import align, bytes_text, column_widths, count_text, differing, shell_path

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


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (6600, "6.6 kB"), (343_000_000, "343 MB"), (999_900, "1000 kB")],
)
def test_sizes_have_three_digits_and_a_decimal_unit(size: int, text: str):
    assert bytes_text(size) == text


def test_counts_have_a_unit_without_a_name():
    assert (count_text(12), count_text(17_560_000_000)) == ("12", "17.6 G")


def test_a_number_beyond_any_float_is_text_too():
    assert count_text(10**400) == "1" + "0" * 388 + " T"


@pytest.mark.parametrize("name", ["run", "my run", "it's", "-x", "--out", "ünï 🌹", "a\nb", "$HOME", "a*b"])
def test_a_path_pasted_into_a_shell_is_one_argument_that_names_it(name: str):
    (argument,) = shlex.split(shell_path(Path(name)))
    assert Path(argument) == Path(name)
    assert not argument.startswith("-")


def test_digests_are_shown_as_far_as_it_takes_to_tell_them_apart():
    assert differing("a" * 64, "b" * 64) == ("a" * 12, "b" * 12)
    assert differing("a" * 64, "a" * 40 + "b" * 24) == ("a" * 41, "a" * 40 + "b")
