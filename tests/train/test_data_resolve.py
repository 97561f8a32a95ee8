import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from vpdeploy.errors import SpecError
from vpdeploy_train.data import resolve_data


@pytest.fixture
def folder(tmp_path):
    for name, count in {"a": 10, "b": 20, "c": 5}.items():
        (tmp_path / name).mkdir()
        for number in range(count):
            (tmp_path / name / f"{number}.png").touch()
    return tmp_path


def names(examples):
    return [example.source.as_posix() for example in examples]


def counts(examples):
    return dict(Counter(example.label for example in examples))


def test_data_without_splits_is_divided_class_by_class(folder):
    source = resolve_data(str(folder), seed=0, val_fraction=0.25)
    assert counts(source.test) == {0: 2, 1: 4, 2: 1}
    assert counts(source.val) == {0: 2, 1: 4, 2: 1}
    assert counts(source.train) == {0: 6, 1: 12, 2: 3}
    everything = names(source.train + source.val + source.test)
    assert len(set(everything)) == len(everything) == 35


def test_the_division_depends_on_the_seed_alone(folder):
    first, again, other = (resolve_data(str(folder), seed=seed) for seed in (1, 1, 2))
    assert names(first.train) == names(again.train)
    assert names(first.val) == names(again.val)
    assert names(first.test) == names(again.test)
    assert names(first.test) != names(other.test)


def test_a_missing_validation_split_is_carved_out_of_train(tmp_path):
    for split, count in {"train": 10, "test": 4}.items():
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                (tmp_path / split / name / f"{number}.png").touch()
    source = resolve_data(str(tmp_path), seed=0)
    assert counts(source.train) == {0: 8, 1: 8}
    assert counts(source.val) == {0: 2, 1: 2}
    assert counts(source.test) == {0: 4, 1: 4}
    assert all("/train/" in name for name in names(source.val))


def test_a_missing_test_split_stays_missing(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(5):
            (tmp_path / "train" / name / f"{number}.png").touch()
    source = resolve_data(str(tmp_path), seed=0)
    assert source.test == ()
    with pytest.raises(SpecError, match="no split 'test'; the splits with images are train, val"):
        source.split("test")


def test_an_unknown_split_is_refused_with_those_there_are():
    with pytest.raises(SpecError, match="no split 'holdout'; the splits with images are train, val, test"):
        resolve_data("digits", seed=0).split("holdout")


def test_a_class_too_small_for_a_validation_split_is_refused(tmp_path):
    for name, count in {"a": 5, "b": 1}.items():
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(count):
            (tmp_path / "train" / name / f"{number}.png").touch()
    with pytest.raises(SpecError, match="class 'b' has 1 image; at least 2 are needed"):
        resolve_data(str(tmp_path), seed=0)
    assert len(resolve_data(str(tmp_path), seed=0, val_fraction=0).train) == 6


def test_a_class_too_small_for_three_parts_is_refused(folder):
    for name in ("d", "e"):
        (folder / name).mkdir()
        for number in range(2):
            (folder / name / f"{number}.png").touch()
    with pytest.raises(SpecError, match=r"class 'd' has 2 images \(and 1 more classes like it\); at least 3"):
        resolve_data(str(folder), seed=0)


def test_the_smallest_classes_are_on_every_side(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(3):
            (tmp_path / name / f"{number}.png").touch()
    source = resolve_data(str(tmp_path), seed=0, val_fraction=0.01)
    assert counts(source.train) == counts(source.val) == counts(source.test) == {0: 1, 1: 1}


def test_given_labels_decide_the_indices(folder):
    own = resolve_data(str(folder), seed=0)
    given = resolve_data(str(folder), seed=0, labels=["c", "x", "b", "a"])
    assert given.labels == ("c", "x", "b", "a")
    assert own.labels == ("a", "b", "c")
    assert all(given.labels[example.label] == example.source.parent.name for example in given.train)


def test_the_labels_of_a_run_give_its_splits_again(folder):
    trained = resolve_data(str(folder), seed=3)
    evaluated = resolve_data(str(folder), seed=3, labels=trained.labels)
    for split in ("train", "val", "test"):
        assert names(trained.split(split)) == names(evaluated.split(split))


def test_a_class_that_the_given_labels_lack_is_refused(folder):
    with pytest.raises(SpecError, match="images of 'c', which is not among the 2 classes that the run's labels"):
        resolve_data(str(folder), seed=0, labels=["a", "b"])


@pytest.mark.parametrize(("labels", "message"), [(["a", "b", "a"], "not unique"), ([], "are empty")])
def test_unusable_labels_are_refused(folder, labels, message):
    with pytest.raises(SpecError, match=message):
        resolve_data(str(folder), seed=0, labels=labels)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_an_impossible_validation_fraction_is_refused(folder, fraction):
    with pytest.raises(SpecError, match="the validation fraction is"):
        resolve_data(str(folder), seed=0, val_fraction=fraction)


@pytest.mark.parametrize("seed", [-1, 2**70])
def test_any_integer_is_a_seed(folder, seed):
    assert len(resolve_data(str(folder), seed=seed).train) > 0


@pytest.mark.parametrize("spec", ["", "imagenet", "vtab", "./digits"])
def test_an_unknown_spec_is_refused_with_the_formats(spec):
    with pytest.raises(SpecError, match=r"unknown data .* expected one of: DIR, FILE\.csv.*digits$"):
        resolve_data(spec, seed=0)


@pytest.mark.parametrize(
    ("spec", "near"),
    [("digit", "digits"), ("digit:parity", "digits:parity"), ("Photo", "photos"), ("./photoss", "photos")],
)
def test_an_unknown_spec_is_told_what_was_perhaps_meant(tmp_path, monkeypatch, spec, near):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match=f"no file or folder there, did you mean '{near}'"):
        resolve_data(spec, seed=0)


def test_a_folder_is_looked_for_beside_the_one_that_is_missing(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(SpecError, match=f"did you mean '{tmp_path / 'photos'}'"):
        resolve_data(str(tmp_path / "photo"), seed=0)


@pytest.mark.parametrize("spec", ["x" * 5000, "~nobody-of-this-name/images"])
def test_a_name_that_no_file_can_have_is_refused(spec):
    with pytest.raises(SpecError, match=r"cannot be looked up"):
        resolve_data(spec, seed=0)


def test_every_refusal_is_one_line(tmp_path):
    for spec in ("", "digits:x", "shapes", str(tmp_path), str(tmp_path / "a.csv")):
        with pytest.raises(SpecError) as caught:
            resolve_data(spec, seed=0)
        assert "\n" not in str(caught.value)


def test_examples_are_read_only():
    pixels = resolve_data("digits", seed=0).train[0].source
    assert isinstance(pixels, np.ndarray)
    with pytest.raises(ValueError, match="read-only"):
        pixels[0, 0, 0] = 1


def test_resolving_does_not_import_torch():
    code = "import sys; from vpdeploy_train.data import resolve_data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
