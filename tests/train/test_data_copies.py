"""The same image in two splits, or with two labels, is found and told."""

import logging
import shutil
from functools import partial

import numpy as np
import pytest
from train.toys import TOY

from vpdeploy.errors import InputError
from vpdeploy_train import TrainSettings, train_run
from vpdeploy_train.data import DataSource, Example
from vpdeploy_train.data.copies import find_copies
from vpdeploy_train.data.example import Record
from vpdeploy_train.inputs import load_inputs

NONE = {"train": 0, "train_val": 0, "train_test": 0, "val_test": 0, "other_label": 0}


def source_of(*, train=(), val=(), test=(), carved=()):
    """Data of (source, label) pairs."""
    parts = {
        split: tuple(Example(source=source, label=label) for source, label in pairs)
        for split, pairs in {"train": train, "val": val, "test": test}.items()
    }
    return DataSource(spec="photos", labels=("cat", "dog"), augmentation="none", carved=carved, **parts)


def write(path, content):
    path.write_bytes(content)
    return path


def record(name, content):
    return Record(name=name, read=partial(bytes, content))


def refuse():
    raise InputError("no image")


@pytest.fixture(params=["file", "record", "pixels"])
def make(request, tmp_path):
    """Makes an image of some bytes, in each of the forms that images have."""
    if request.param == "file":
        return lambda name, content: write(tmp_path / name, content)
    if request.param == "record":
        return record
    return lambda name, content: np.frombuffer(content * 3, np.uint8).reshape(1, -1, 3)


def test_different_images_are_no_copies(make):
    source = source_of(train=[(make("a", b"aaaa"), 0), (make("b", b"bbbb"), 1)], test=[(make("c", b"ccc"), 0)])
    found = find_copies(source)
    assert (found.to_json(), found.remarks()) == (NONE, [])


def test_copies_are_counted_by_the_splits_they_are_in(make):
    one, two, three = b"1111", b"2222", b"3333"
    source = source_of(
        train=[(make("a", one), 0), (make("b", one), 0), (make("c", two), 1)],
        val=[(make("d", two), 1), (make("e", three), 1)],
        test=[(make("f", one), 0), (make("g", two), 1), (make("h", three), 1), (make("i", b"4444"), 0)],
    )
    found = find_copies(source)
    assert found.to_json() == {"train": 1, "train_val": 1, "train_test": 2, "val_test": 2, "other_label": 0}
    assert len(found.remarks()) == 4


def test_the_first_pairs_are_named_and_the_advice_fits(tmp_path):
    train = [(write(tmp_path / f"t{n}", b"%d" % n), 0) for n in range(5)]
    val = [(write(tmp_path / f"v{n}", b"%d" % n), 0) for n in range(5)]
    (line,) = find_copies(source_of(train=train, val=val)).remarks()
    assert line.startswith("5 images of val are in train, too, byte for byte, so results on val are better than on new")
    assert line.endswith("".join(f"{tmp_path}/t{n} = {tmp_path}/v{n}; " for n in range(3)) + "...")
    (line,) = find_copies(source_of(train=train, val=val[:1], carved=("val",))).remarks()
    assert "1 image of val is in train, too" in line
    assert "as chance divides them" in line


def test_a_copy_with_another_label_is_named_with_both(make, tmp_path):
    source = source_of(train=[(make("a", b"1111"), 0), (make("b", b"1111"), 1), (make("c", b"2222"), 1)])
    found = find_copies(source)
    assert (found.to_json()["other_label"], found.to_json()["train"]) == (1, 1)
    line = found.remarks()[0]
    assert line.startswith("1 training image has a copy with another label: keep the right one: ")
    assert "'cat' = " in line
    assert line.endswith("'dog'")


def test_large_files_are_compared_to_their_ends(tmp_path):
    head = bytes(100_000)
    files = [write(tmp_path / str(number), head + tail) for number, tail in enumerate((b"a", b"b", b"a"))]
    source = source_of(train=[(files[0], 0), (files[1], 0)], test=[(files[2], 0)])
    assert find_copies(source).to_json() == NONE | {"train_test": 1}


def test_files_of_other_sizes_are_not_opened(tmp_path, monkeypatch):
    files = [write(tmp_path / str(number), bytes(number + 1)) for number in range(4)]
    monkeypatch.setattr("vpdeploy_train.data.copies._digest", lambda path, limit: pytest.fail("read"))
    assert find_copies(source_of(train=[(file, 0) for file in files])).to_json() == NONE


def test_empty_and_missing_and_unreadable_images_are_left_out(tmp_path):
    empty = [(write(tmp_path / name, b""), 0) for name in ("a", "b")]
    missing = [(tmp_path / "c", 0), (tmp_path / "d", 0), (Record(name="e", read=refuse), 0)]
    assert find_copies(source_of(train=empty + missing)).to_json() == NONE
    assert find_copies(source_of()).to_json() == NONE


def test_training_warns_and_notes_the_counts(colours, tmp_path, toy_weights, caplog, monkeypatch):
    monkeypatch.setattr("vpdeploy_train.training.plot_curves", lambda history, path: path.touch())
    photos = tmp_path / "photos"
    for split in ("train", "val", "test"):
        shutil.copytree(colours, photos / split)
    settings = TrainSettings.of(
        **{"data": str(photos), "method": "linear", "backbone": TOY, "weights": str(toy_weights), "augment": "none"},
        **{"epochs": 1, "device": "cpu"},
    )
    with caplog.at_level(logging.WARNING, "vpdeploy.train"):
        result = train_run(settings, tmp_path / "run")
    assert sum("byte for byte" in record.getMessage() for record in caplog.records) == 3
    assert result.run.card.details["data"]["copies"] == NONE | {"train_val": 42, "train_test": 42, "val_test": 42}


def test_images_that_chance_divides_are_compared_too(colours, tmp_path, toy_weights):
    photos = shutil.copytree(colours, tmp_path / "photos")
    for number in range(14):
        shutil.copyfile(photos / "red" / f"{number:02}.png", photos / "red" / f"copy{number:02}.png")
    settings = TrainSettings.of(
        **{"data": str(photos), "method": "linear", "backbone": TOY, "weights": str(toy_weights), "augment": "none"}
    )
    copies = load_inputs(settings).copies
    assert copies.across["train", "val"][0] + copies.across["train", "test"][0] > 0
    assert any("as chance divides them" in line for line in copies.remarks())
