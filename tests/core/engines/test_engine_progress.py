from __future__ import annotations

import pytest

from vpdeploy.engines.progress import BuildProgress


def test_a_phase_fills_the_step_of_its_parent():
    progress = BuildProgress()
    progress.start("build", None, 4)
    assert progress.snapshot() == (0.0, "build")
    progress.step("build", 0)
    assert progress.snapshot()[0] == pytest.approx(1 / 4)
    progress.start("graph", "build", 2)
    progress.step("graph", 0)
    assert progress.snapshot() == (pytest.approx(1 / 4 + 1 / 8), "graph")
    progress.start("node", "graph", 5)
    progress.step("node", 1)
    assert progress.snapshot()[0] == pytest.approx(1 / 4 + (1 / 2 + (2 / 5) / 2) / 4)


def test_the_share_does_not_fall_when_a_phase_is_entered_again():
    progress = BuildProgress()
    progress.start("build", None, 2)
    for _ in range(3):
        progress.start("reformat", "build", 1)
        progress.step("reformat", 0)
        progress.finish("reformat")
        assert progress.snapshot() == (pytest.approx(1 / 2), "build")
    progress.step("build", 0)
    assert progress.snapshot()[0] == pytest.approx(1 / 2)
    progress.finish("build")
    assert progress.snapshot()[0] == 1


def test_cancelling_answers_the_next_step_with_false():
    progress = BuildProgress()
    progress.start("build", None, 2)
    assert progress.step("build", 0)
    progress.cancel()
    assert not progress.step("build", 1)


def test_steps_of_unknown_phases_are_no_error():
    progress = BuildProgress()
    assert progress.step("unknown", 3)
    progress.finish("unknown")
    assert progress.snapshot() == (0.0, "")
