from __future__ import annotations

from pathlib import Path

import pytest
from core import toy

from vpdeploy.engines.profile import AxisRange, Profile, present_sizes
from vpdeploy.errors import SpecError
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.interface import Binding


def artifact_of(path: Path, *prompt_sets) -> Artifact:
    return Artifact.of_bundle(toy.write(path / "zoo", *prompt_sets))


def test_the_sizes_of_the_present_tasks_are_those_of_their_table(toy_artifact: Artifact):
    """The toy's tasks have prefixes of 3 and 5, and 4 and 2 classes; a table holds the largest of each."""
    assert present_sizes(toy_artifact) == {"prefix": 5, "classes": 4, "slots": 2}


def test_a_small_bundle_gets_room_for_tasks_to_come(toy_artifact: Artifact):
    assert Profile().completed(toy_artifact, present_sizes(toy_artifact)).ranges == {
        "batch": (1, 8, 32),
        "slots": (1, 64, 1024),
        "prefix": (1, 8, 64),
        "classes": (1, 16, 1024),
    }


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        ({"prefix": 104, "classes": 1000, "slots": 3}, {"prefix": (1, 104, 104), "classes": (1, 1024, 1024)}),
        ({"prefix": 8, "classes": 1025, "slots": 3}, {"classes": (1, 2048, 2048)}),
        ({"prefix": 8, "classes": 4, "slots": 513}, {"slots": (1, 1024, 2048)}),
        ({"prefix": 8, "classes": 4, "slots": 512}, {"slots": (1, 512, 1024)}),
        ({"prefix": 8, "classes": 4, "slots": 5000}, {"slots": (1, 8192, 16384)}),
    ],
)
def test_what_the_present_tasks_need_is_held_and_a_little_more(toy_artifact: Artifact, present, expected):
    profile = Profile().completed(toy_artifact, present)
    assert {axis: profile[axis] for axis in expected} == expected
    assert all(profile[axis].holds(size) for axis, size in present.items())


def test_tables_beyond_what_tensorrt_addresses_are_not_reserved(toy_artifact: Artifact):
    """A slot of the toy has 2*2*P*3 key elements; with P = 2**20 at most 170 slots stay below 2**31."""
    present = {"prefix": 2**20, "classes": 4, "slots": 100}
    assert Profile().completed(toy_artifact, present)["slots"] == (1, 128, (2**31 - 1) // (12 * 2**20))


def test_what_is_asked_for_is_taken(toy_artifact: Artifact):
    asked = Profile().add("batch", AxisRange(2, 4, 6)).add("slots", AxisRange(1, 2, 3))
    profile = asked.completed(toy_artifact, present_sizes(toy_artifact))
    assert (profile["batch"], profile["slots"]) == ((2, 4, 6), (1, 2, 3))


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"slots": AxisRange(1, 1, 1)}, "--slots 1:1:1: the bundle's tasks need 2 already"),
        ({"classes": AxisRange(1, 2, 3)}, "--classes 1:2:3: the bundle's tasks need 4 already"),
        ({"prefix": AxisRange(1, 2, 4)}, "--prefix 1:2:4: the bundle's tasks need 5 already"),
        ({"prefix": AxisRange(16, 16, 64)}, "--prefix 16:16:64: the bundle's table has 5 columns now"),
        (
            {"hidden": AxisRange(1, 2, 3)},
            "--hidden: the bundle's graph has --batch, --slots, --prefix, --classes; leave",
        ),
    ],
)
def test_a_range_that_does_not_fit_the_bundle_is_refused(toy_artifact: Artifact, asked, complaint):
    with pytest.raises(SpecError, match=complaint):
        Profile(ranges=asked).completed(toy_artifact, present_sizes(toy_artifact))


def test_a_folded_model_has_a_batch_and_no_table(folded_flowers: Path):
    artifact = Artifact.open(folded_flowers)
    assert present_sizes(artifact) == {}
    assert Profile().completed(artifact, {}).ranges == {"batch": (1, 8, 32)}
    with pytest.raises(SpecError, match="--slots: a folded model has only --batch; leave it out"):
        Profile().add("slots", AxisRange(1, 2, 3)).completed(artifact, {})


def test_an_empty_bundle_gets_a_profile_all_the_same(tmp_path: Path):
    from vpdeploy.format.bundle import withdraw_task

    artifact = artifact_of(tmp_path)
    for task in ("flowers", "birds"):
        withdraw_task(artifact.path, task)
    empty = Artifact.open(artifact.path)
    assert present_sizes(empty) == {"prefix": 1, "classes": 1, "slots": 1}
    assert Profile().completed(empty, present_sizes(empty))["slots"] == (1, 64, 1024)


def test_shapes_follow_from_the_axes():
    binding = Binding(dtype="float16", shape=("slots", 2, "prefix"))
    profile = Profile().add("slots", AxisRange(1, 2, 3)).add("prefix", AxisRange(8, 16, 24))
    assert profile.shapes_of(binding) == ((1, 2, 8), (2, 2, 16), (3, 2, 24))


def test_a_profile_is_built_axis_by_axis_and_no_step_changes_the_one_before():
    batch = Profile().add("batch", AxisRange(1, 8, 32))
    both = batch.add("slots", AxisRange(1, 2, 3))
    assert (str(batch), str(both)) == ("batch 1:8:32", "batch 1:8:32, slots 1:2:3")
    assert str(both.add("batch", AxisRange(4, 4, 4))) == "batch 4:4:4, slots 1:2:3"


def test_what_a_user_asks_for_is_read_by_axis_and_the_rest_is_left_open():
    assert Profile.parse({"batch": "1:8:32", "slots": None, "classes": "10"}).ranges == {
        "batch": (1, 8, 32),
        "classes": (10, 10, 10),
    }
    with pytest.raises(SpecError, match=r"--classes 3:2:1: expected 1 <= MIN"):
        Profile.parse({"classes": "3:2:1"})


def test_a_profile_tells_which_size_it_cannot_take():
    profile = Profile().add("batch", AxisRange(1, 8, 32)).add("slots", AxisRange(1, 64, 1024))
    assert profile.oversize({"batch": 32, "slots": 1, "unknown": 10**9}) is None
    assert profile.oversize({"batch": 8, "slots": 1025}) == "slots 1025 is outside 1:64:1024 (min:opt:max)"
    assert profile.oversize({"batch": 0}) is not None


@pytest.mark.parametrize(("text", "expected"), [("1:8:32", (1, 8, 32)), ("4", (4, 4, 4)), (" 1 : 2 : 3", (1, 2, 3))])
def test_a_range_is_three_numbers_or_one(text, expected):
    assert AxisRange.parse(text, "--batch") == expected


@pytest.mark.parametrize("text", ["", "1:2", "a:b:c", "1:2:3:4", "0:1:2", "2:1:3", "1:4:3", "-1", "1.5"])
def test_what_is_no_range_is_refused_with_the_option(text):
    with pytest.raises(SpecError, match=r"--batch .*: expected"):
        AxisRange.parse(text, "--batch")
