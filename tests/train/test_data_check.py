from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vpdeploy.errors import InputError
from vpdeploy_train.data import Example, check_images


@pytest.fixture
def examples(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    files = [tmp_path / f"{number}.jpg" for number in range(8)]
    for file in files:
        Image.fromarray(noise).save(file)
    return [Example(source=file, label=0) for file in files]


def damage(example):
    data = example.source.read_bytes()
    example.source.write_bytes(data[: len(data) // 2])


def test_good_images_pass_and_progress_is_reported(examples):
    seen = []
    check_images(examples, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 8) for done in range(1, 9)]


def test_a_file_that_occurs_twice_is_decoded_once(examples):
    seen = []
    check_images(examples + examples, on_progress=lambda done, total: seen.append(total))
    assert seen == [8] * 8


def test_every_damaged_image_is_counted_and_the_first_are_named(examples):
    for number in (1, 2, 4, 6):
        damage(examples[number])
    examples[7].source.unlink()
    with pytest.raises(InputError) as caught:
        check_images(examples)
    message = str(caught.value)
    assert message.startswith("5 of 8 images cannot be used: replace or remove them")
    assert [name in message for name in ("1.jpg", "2.jpg", "4.jpg", "6.jpg")] == [True, True, True, False]
    assert message.endswith("; and 2 more")
    assert "\n" not in message


def test_a_missing_image_is_named(examples):
    examples[3].source.unlink()
    with pytest.raises(InputError, match=r"1 of 8 images .*3\.jpg: file not found$"):
        check_images(examples)


def test_a_text_file_that_is_called_an_image_is_found(examples):
    examples[0].source.write_text("hello")
    with pytest.raises(InputError, match=r"0\.jpg: not a readable image"):
        check_images(examples)


def test_too_large_images_are_found(examples):
    with pytest.raises(InputError, match=r"8 of 8 images .*80×60 is more than the accepted 100 pixels"):
        check_images(examples, max_pixels=100)


def test_pixels_and_no_images_at_all_need_no_check():
    check_images([Example(source=np.zeros((2, 2, 3), np.uint8), label=0)])
    check_images([])


def test_one_thread_finds_the_same(examples):
    damage(examples[5])
    with pytest.raises(InputError, match=Path(examples[5].source).name):
        check_images(examples, threads=1)
