from __future__ import annotations

import pytest

pytest.importorskip("PIL", reason="needs the train extra")

from PIL import Image

from benchmarks.accuracy.sampling import Picture, draw_splits, quotas

SIZES = {"train": 8, "val": 4, "test": 4}


def picture(number: int, *, label: str = "a", origin: str | None = None, colour: int | None = None) -> Picture:
    shade = number if colour is None else colour
    return Picture(label=label, origin=origin or f"{number:03}", load=lambda: Image.new("RGB", (4, 4), (shade, 0, 0)))


def shades(splits: dict[str, list[tuple[str, Image.Image]]]) -> dict[str, set[int]]:
    return {name: {image.getpixel((0, 0))[0] for _, image in split} for name, split in splits.items()}


def test_pictures_of_one_origin_stay_in_one_split():
    pictures = [picture(number, origin=f"{number // 4}") for number in range(64)]
    drawn = shades(draw_splits({("train", "val", "test"): pictures}, SIZES, seed=0))
    origins = {name: {shade // 4 for shade in found} for name, found in drawn.items()}
    assert {name: len(found) for name, found in drawn.items()} == SIZES
    assert not origins["train"] & origins["test"]
    assert not origins["train"] & origins["val"]
    assert not origins["val"] & origins["test"]


def test_equal_pixels_are_drawn_once_even_across_splits():
    pictures = [picture(number, colour=number % 12) for number in range(60)]
    drawn = shades(draw_splits({("train", "val", "test"): pictures}, SIZES, seed=0))
    assert sum(len(found) for found in drawn.values()) == 12
    assert len(set.union(*drawn.values())) == 12


def test_a_published_test_split_stays_apart():
    pools = {("train", "val"): [picture(n) for n in range(40)], ("test",): [picture(n) for n in range(100, 140)]}
    drawn = shades(draw_splits(pools, SIZES, seed=0))
    assert min(drawn["test"]) >= 100
    assert max(drawn["train"] | drawn["val"]) < 100


def test_the_seed_decides():
    pools = {("train", "val", "test"): [picture(number) for number in range(64)]}
    first, again, other = (shades(draw_splits(pools, SIZES, seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_a_class_without_training_images_is_refused():
    pools = {
        ("train",): [picture(n) for n in range(8)],
        ("val",): [picture(n) for n in range(8, 12)],
        ("test",): [picture(n, label="stranger") for n in range(12, 16)],
    }
    with pytest.raises(ValueError, match="no training image of class 'stranger'"):
        draw_splits(pools, SIZES, seed=0)


def test_every_split_has_the_classes_shares_of_the_source():
    pictures = [picture(n, label="a" if n % 4 else "b", origin="first" if n < 32 else f"{n}") for n in range(96)]
    drawn = draw_splits({("train", "val", "test"): pictures}, SIZES, seed=0)
    assert {name: sum(label == "b" for label, _ in split) for name, split in drawn.items()} == {
        "train": 2,
        "val": 1,
        "test": 1,
    }


def test_quotas_add_up():
    assert quotas({"a": 0.5, "b": 0.26, "c": 0.24}, 10) == {"a": 5, "b": 3, "c": 2}
    assert quotas({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, 4) == {"a": 2, "b": 1, "c": 1}
