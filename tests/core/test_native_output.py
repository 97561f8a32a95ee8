from __future__ import annotations

import os

import pytest

from vpdeploy.cli.native_output import without_lines


def test_lines_of_a_library_are_kept_back_and_others_printed_after_the_block(capfd: pytest.CaptureFixture[str]):
    with without_lines(b"noise") as stderr:
        os.write(2, b"noise: of a library\nsomething else\n")
        stderr.write("at once\n")
        stderr.flush()
        assert capfd.readouterr().err == "at once\n"
    assert capfd.readouterr().err == "something else\n"


def test_stderr_is_back_after_an_error(capfd: pytest.CaptureFixture[str]):
    def fail() -> None:
        with without_lines(b"noise"):
            os.write(2, b"kept\n")
            raise ValueError("failed")

    with pytest.raises(ValueError, match="failed"):
        fail()
    os.write(2, b"direct\n")
    assert capfd.readouterr().err == "kept\ndirect\n"
