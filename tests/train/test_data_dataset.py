import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from vpdeploy.errors import InputError
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy.image import load_pixels
from vpdeploy_train.data import CacheBudget, Example, ImageDataset, build_augmentation, preload_images
from vpdeploy_train.data.example import Record

PREPROCESSING = Preprocessing(image_size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
FINAL_BYTES = 32 * 32 * 3


@pytest.fixture
def examples(tmp_path):
    generator = np.random.default_rng(0)
    made = []
    for number in range(6):
        file = tmp_path / f"{number}.png"
        Image.fromarray(generator.integers(0, 255, (60, 60, 3), dtype=np.uint8)).save(file)
        made.append(Example(source=file, label=number % 2))
    return made


def test_evaluation_pixels_are_those_that_will_be_served(examples):
    dataset = ImageDataset(examples, PREPROCESSING)
    assert len(dataset) == 6
    for index, example in enumerate(examples):
        pixels, label = dataset[index]
        assert pixels.dtype == torch.uint8
        assert label == example.label
        assert (pixels.numpy() == load_pixels(example.source, PREPROCESSING)).all()


def test_pixels_in_memory_are_scaled(examples):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, 4:] = 255
    pixels.flags.writeable = False
    result, label = ImageDataset([Example(source=pixels, label=3)], PREPROCESSING)[0]
    assert result.shape == (32, 32, 3)
    assert label == 3
    assert result[16, 0].tolist() == [0, 0, 0]
    assert result[16, 31].tolist() == [255, 255, 255]


def test_what_the_caller_does_to_the_pixels_does_not_reach_the_cache(examples):
    dataset = ImageDataset(examples, PREPROCESSING)
    before = dataset[0][0].clone()
    dataset[0][0].zero_()
    assert (dataset[0][0] == before).all()


@pytest.mark.parametrize("name", ["none", "crop-flip", "rand-augment"])
def test_the_second_epoch_decodes_nothing(examples, decoded, name):
    dataset = ImageDataset(examples, PREPROCESSING, build_augmentation(name, PREPROCESSING))
    for epoch in range(3):
        for index in range(6):
            dataset.draw(index, epoch=epoch)
    assert len(decoded) == 6


@pytest.mark.parametrize("name", ["none", "flip", "crop", "crop-flip", "rand-augment"])
def test_the_cache_changes_no_pixel(examples, name):
    augmentation = build_augmentation(name, PREPROCESSING)
    cached = ImageDataset(examples, PREPROCESSING, augmentation, 3)
    plain = ImageDataset(examples, PREPROCESSING, augmentation, 3, budget=CacheBudget(0))
    for epoch in (0, 1):
        for index in (5, 0, 3):
            assert (cached.draw(index, epoch=epoch)[0] == plain.draw(index, epoch=epoch)[0]).all()


def test_the_cache_keeps_to_its_budget(examples, decoded):
    dataset = ImageDataset(examples, PREPROCESSING, budget=CacheBudget(2 * FINAL_BYTES + 100))
    for _ in range(2):
        for index in range(6):
            dataset[index]
    assert len(decoded) == 6 + 4


@pytest.mark.parametrize(
    ("name", "image_bytes"), [("none", FINAL_BYTES), ("flip", 37 * 37 * 3), ("crop-flip", 37 * 37 * 3)]
)
def test_whether_everything_fits_is_known_beforehand(examples, name, image_bytes):
    augmentation = build_augmentation(name, PREPROCESSING)  # a crop is prepared at 32 / 0.875 = 37 pixels
    budget = 6 * image_bytes
    assert ImageDataset(examples, PREPROCESSING, augmentation, budget=CacheBudget(budget)).fits_cache
    assert not ImageDataset(examples, PREPROCESSING, augmentation, budget=CacheBudget(budget - 1)).fits_cache


def test_two_data_sets_keep_to_the_budget_they_share(examples, decoded):
    budget = CacheBudget(8 * FINAL_BYTES)
    first, second = (ImageDataset(examples, PREPROCESSING, budget=budget) for _ in range(2))
    for index in range(6):
        first[index]
    assert (first.kept, second.fits_cache) == (6, False)
    for index in range(6):
        second[index]
    assert (second.kept, budget.free_bytes) == (2, 0)


def test_an_image_in_a_table_is_decoded_like_a_file(examples):
    record = Record(name="table, row 3", read=examples[3].source.read_bytes)
    pixels, label = ImageDataset([Example(source=record, label=4)], PREPROCESSING)[0]
    assert (pixels.numpy() == load_pixels(examples[3].source, PREPROCESSING)).all()
    assert label == 4


def test_a_damaged_image_in_a_table_is_named(examples):
    record = Record(name="table, row 3", read=lambda: b"nonsense")
    with pytest.raises(InputError, match=r"^table, row 3: not a readable image \(not in a known image format\)"):
        ImageDataset([Example(source=record, label=0)], PREPROCESSING)[0]


def test_an_image_varies_with_seed_epoch_and_index_alone(examples):
    same = [Example(source=examples[0].source, label=0)] * 2
    augmentation = build_augmentation("crop", PREPROCESSING)

    def pixels(seed, epoch, index):
        dataset = ImageDataset(same, PREPROCESSING, augmentation, seed)
        dataset[1 - index]
        torch.rand(1)
        return dataset.draw(index, epoch=epoch)[0].numpy().tobytes()

    for index in (0, 1):
        assert pixels(0, 0, index) == pixels(0, 0, index)
    for axis in range(3):
        seen = {pixels(*[value if place == axis else 0 for place in range(3)]) for value in range(2)}
        assert len(seen) == 2


def test_the_cache_is_not_sent_to_other_processes(examples, decoded):
    dataset = ImageDataset(examples, PREPROCESSING)
    preload_images([dataset])
    copy = pickle.loads(pickle.dumps(dataset))  # noqa: S301
    assert (copy[1][0] == dataset[1][0]).all()
    assert len(decoded) == 7
