import logging
import re
import threading

import numpy as np
import pytest
from PIL import Image

import vpdeploy_train.data.preload as preload_module
from vpdeploy.errors import InputError
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy_train.data import CacheBudget, Example, ImageDataset, preload_images

SIDE = 32
PREPROCESSING = Preprocessing(image_size=SIDE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.fixture
def examples(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    files = [tmp_path / f"{number}.jpg" for number in range(8)]
    for file in files:
        Image.fromarray(noise).save(file)
    return [Example(source=file, label=0) for file in files]


def preload(examples, images=100, **options):
    """Preload into a cache with room for so many images."""
    dataset = ImageDataset(examples, PREPROCESSING, budget=CacheBudget(images * SIDE * SIDE * 3))
    preload_images([dataset], **options)
    return dataset


def damage(example):
    data = example.source.read_bytes()
    example.source.write_bytes(data[: len(data) // 2])


def test_every_image_is_decoded_once_and_never_again(examples, decoded):
    dataset = preload(examples, threads=2)
    assert sorted(decoded) == sorted(example.source for example in examples)
    for epoch in (0, 1):
        for index in range(8):
            dataset.draw(index, epoch=epoch)
    assert len(decoded) == 8


def test_progress_is_reported(examples):
    seen = []
    preload(examples, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 8) for done in range(1, 9)]


def test_what_is_kept_already_is_not_decoded_again(examples, decoded):
    dataset = preload(examples)
    preload_images([dataset])
    assert len(decoded) == 8


def test_images_that_do_not_fit_are_checked_all_the_same(examples, decoded):
    dataset = preload(examples, images=3, threads=1)
    assert (len(decoded), dataset.kept) == (8, 3)
    damage(examples[7])
    with pytest.raises(InputError, match=r"1 of 8 images .*7\.jpg"):
        preload(examples, images=3)


def test_the_first_data_sets_images_are_kept_first(examples):
    budget = CacheBudget(10 * SIDE * SIDE * 3)
    train, val = (ImageDataset(examples, PREPROCESSING, budget=budget) for _ in range(2))
    preload_images([train, val])
    assert (train.kept, val.kept) == (8, 2)


def test_every_damaged_image_is_counted_and_the_first_are_named(examples):
    for number in (1, 2, 4, 6):
        damage(examples[number])
    examples[7].source.unlink()
    with pytest.raises(InputError) as caught:
        preload(examples)
    message = str(caught.value)
    assert message.startswith("5 of 8 images cannot be used: replace or remove them")
    assert [name in message for name in ("1.jpg", "2.jpg", "4.jpg", "6.jpg")] == [True, True, True, False]
    assert message.endswith("; and 2 more")
    assert "\n" not in message


def test_a_missing_image_is_named(examples):
    examples[3].source.unlink()
    with pytest.raises(InputError, match=r"1 of 8 images .*3\.jpg: file not found$"):
        preload(examples)


def test_a_text_file_that_is_called_an_image_is_found(examples):
    examples[0].source.write_text("hello")
    with pytest.raises(InputError, match=r"0\.jpg: not a readable image"):
        preload(examples)


@pytest.mark.parametrize(
    ("images", "message"),
    [(8, "8 images read and kept in memory"), (3, "8 images read, 3 kept in memory .* decoded in every epoch")],
)
def test_what_was_kept_is_logged(examples, caplog, images, message):
    with caplog.at_level(logging.INFO, "vpdeploy.train"):
        preload(examples, images=images)
    assert len(caplog.records) == 1
    assert re.search(message, caplog.text)


def test_pixels_and_no_images_at_all_are_nothing_to_talk_about(caplog):
    with caplog.at_level(logging.INFO, "vpdeploy.train"):
        preload([Example(source=np.zeros((2, 2, 3), np.uint8), label=0)])
        preload([])
        preload_images([])
    assert not caplog.records


def test_no_more_images_are_decoded_at_once_than_threads_and_few_wait(examples, monkeypatch):
    running, most, begun = 0, 0, 0
    lock = threading.Lock()
    prepare = ImageDataset.prepare

    def count(self, index):
        nonlocal running, most, begun
        with lock:
            running, begun = running + 1, begun + 1
            most = max(most, running)
        try:
            return prepare(self, index)
        finally:
            with lock:
                running -= 1

    monkeypatch.setattr(ImageDataset, "prepare", count)
    monkeypatch.setattr(preload_module, "usable_cores", lambda: 64)
    monkeypatch.setattr(preload_module, "_MOST_THREADS", 2)
    ahead = []
    preload(examples * 10, on_progress=lambda done, total: ahead.append(begun - done))
    assert most <= 2
    assert max(ahead) <= 2 * preload_module._IN_FLIGHT
    assert begun == 80
