"""What is told of the data before training."""

import logging
import shutil

import numpy as np
import pytest
from train.toys import TOY

from vpdeploy_train import TrainSettings
from vpdeploy_train.data import DataSource, Example
from vpdeploy_train.data.summary import DataSummary
from vpdeploy_train.inputs import load_inputs

PIXELS = np.zeros((2, 2, 3), np.uint8)


def summarise(sizes, *, val=0, carved=()):
    """Summarise data with so many training images of each class."""
    train = tuple(Example(source=PIXELS, label=n) for n, size in enumerate(sizes.values()) for _ in range(size))
    held_out = tuple(Example(source=PIXELS, label=0) for _ in range(val))
    return DataSummary.of(
        DataSource(
            **{"spec": "/far/away/photos", "labels": tuple(sizes), "train": train, "val": held_out, "test": ()},
            **{"augmentation": "none", "carved": carved},
        )
    )


def test_one_line_tells_classes_and_splits_and_what_was_held_out():
    assert summarise({"cat": 9, "dog": 12, "emu": 7}, val=3, carved=("val",)).to_text() == (
        "photos: 3 classes of 7 (of 'emu') to 12 (of 'dog') training images each; "
        "images: train 28, val 3 (held out of train), test 0"
    )
    assert summarise({"cat": 9, "dog": 9}).to_text() == (
        "photos: 2 classes of 9 training images each; images: train 18, val 0, test 0"
    )


def test_even_classes_of_some_size_are_nothing_to_remark():
    assert summarise({"cat": 5, "dog": 50}).remarks() == []


def test_imbalance_is_named_with_the_option_that_helps():
    assert summarise({"cat": 5, "dog": 51}).remarks(balanced=True) == []
    (line,) = summarise({"cat": 5, "dog": 51}).remarks()
    assert line.startswith("class 'dog' has 51 training images, 'cat' 5: --class-weights balanced ")


def test_classes_of_a_handful_of_images_are_named():
    (line,) = summarise({"a": 4, "b": 1, "c": 3, "d": 0, "e": 9}).remarks()
    assert line == "4 classes have fewer than 5 training images ('d' 0, 'b' 1, 'c' 3, ...): expect little of them"
    assert summarise({"a": 4, "b": 9}).remarks()[0].startswith("1 class has fewer than 5 training images ('a' 4)")


def test_a_class_name_of_several_lines_is_told_in_one():
    assert "\n" not in summarise({"two\nlines": 3, "x" * 500: 99}).to_text()


@pytest.fixture
def settings(colours, tmp_path, toy_weights):
    return TrainSettings.of(
        **{"data": str(shutil.copytree(colours, tmp_path / "photos")), "method": "linear", "backbone": TOY},
        **{"weights": str(toy_weights), "augment": "none"},
    )


def test_training_tells_the_summary_before_the_images_are_read(settings, caplog):
    with caplog.at_level(logging.INFO, "vpdeploy.train"):
        load_inputs(settings)
    told = [record.getMessage() for record in caplog.records]
    assert told[0] == (
        "photos: 3 classes of 9 training images each; "
        "images: train 27, val 6 (held out of train), test 9 (held out of all images)"
    )
    assert any("images read" in line for line in told[1:])


def test_the_summary_has_a_json_form():
    assert summarise({"cat": 9, "dog": 12}, carved=("val", "test")).to_json() == {
        "held_out": ["val", "test"],
        "largest_class": {"label": "dog", "images": 12},
        "smallest_class": {"label": "cat", "images": 9},
    }
