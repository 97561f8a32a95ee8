import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image

from vpdeploy.errors import SpecError
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy.image import fit_image
from vpdeploy_train.data import AUGMENTATIONS, build_augmentation
from vpdeploy_train.data.augmentation import seeded_randomness

VARYING = [name for name in AUGMENTATIONS if name != "none"]


def preprocessing(**fields):
    return Preprocessing(image_size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), **fields)


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def vary(augmentation, image, seed):
    with seeded_randomness((seed,)):
        return np.asarray(augmentation.vary(augmentation.prepare(image)))


def test_none_is_no_augmentation():
    assert build_augmentation("none", preprocessing()) is None


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(SpecError, match="unknown augmentation 'mixup'; expected one of: none, flip, crop, crop-flip"):
        build_augmentation("mixup", preprocessing())


@pytest.mark.parametrize("name", VARYING)
@pytest.mark.parametrize("resize", ["crop", "squash"])
@pytest.mark.parametrize("size", [(90, 60), (32, 32), (5, 200), (600, 6), (1, 1)])
def test_any_image_comes_out_at_the_size_of_the_backbone(name, resize, size):
    augmentation = build_augmentation(name, preprocessing(resize=resize, crop_ratio=1.0))
    pixels = vary(augmentation, noise(*size), 0)
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8


@pytest.mark.parametrize("name", VARYING)
def test_one_seed_gives_one_image_and_other_seeds_give_others(name):
    augmentation = build_augmentation(name, preprocessing())
    images = [vary(augmentation, noise(90, 60), seed).tobytes() for seed in range(8)]
    assert images == [vary(augmentation, noise(90, 60), seed).tobytes() for seed in range(8)]
    assert len(set(images)) > 1


@pytest.mark.parametrize("name", VARYING)
def test_an_augmentation_works_the_same_in_another_process(name):
    augmentation = build_augmentation(name, preprocessing())
    travelled = pickle.loads(pickle.dumps(augmentation))  # noqa: S301
    assert (vary(augmentation, noise(90, 60), 1) == vary(travelled, noise(90, 60), 1)).all()


@pytest.mark.parametrize(("size", "expected"), [((2000, 2), (148, 37)), ((2, 2000), (37, 148)), ((80, 20), (148, 37))])
def test_a_strip_is_cut_to_four_times_its_width_before_it_is_scaled(size, expected):
    assert build_augmentation("crop", preprocessing()).prepare(noise(*size)).size == expected


def test_rand_augment_never_fails_at_its_strongest(monkeypatch):
    monkeypatch.setattr(random, "gauss", lambda mean, deviation: mean + 10 * deviation)
    augmentation = build_augmentation("rand-augment", preprocessing())
    prepared = augmentation.prepare(noise(32, 32))
    for seed in range(200):
        with seeded_randomness((seed,)):
            assert augmentation.vary(prepared).size == (32, 32)


def test_flip_gives_the_evaluation_pixels_or_their_mirror_image():
    image = noise(90, 60)
    straight = fit_image(image, preprocessing())
    results = [vary(build_augmentation("flip", preprocessing()), image, seed) for seed in range(20)]
    mirrored = [bool((pixels == straight[:, ::-1]).all()) for pixels in results]
    assert all(flag or (pixels == straight).all() for flag, pixels in zip(mirrored, results, strict=True))
    assert 0 < sum(mirrored) < 20


def test_crop_cuts_a_window_out_of_the_scaled_image():
    augmentation = build_augmentation("crop", preprocessing(crop_ratio=0.5))
    scaled = np.asarray(augmentation.prepare(noise(90, 60)))
    assert scaled.shape == (64, 96, 3)  # shorter side 32 / 0.5
    windows = np.lib.stride_tricks.sliding_window_view(scaled, (32, 32, 3)).reshape(-1, 32, 32, 3)
    places = [np.flatnonzero((windows == vary(augmentation, noise(90, 60), seed)).all((1, 2, 3))) for seed in range(4)]
    assert all(len(place) == 1 for place in places)
    assert len({int(place[0]) for place in places}) > 1


@pytest.mark.parametrize(("ratio", "side"), [(1.0, 256), (0.9, 256), (0.875, 256), (0.7, 320)])
def test_a_crop_always_has_the_room_of_the_papers(ratio, side):
    wanted = Preprocessing(image_size=224, crop_ratio=ratio, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert build_augmentation("crop-flip", wanted).prepare(noise(40, 30)).size[1] == side


def test_seeding_leaves_the_global_random_states_alone():
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    expected = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    with seeded_randomness((5, 6)):
        inside = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == expected
    assert inside != expected


def test_every_part_of_the_seed_matters():
    def draw(*seed):
        with seeded_randomness(seed):
            return torch.rand(1).item(), np.random.rand(), random.random()

    drawn = [draw(0, 0, 0), draw(1, 0, 0), draw(0, 1, 0), draw(0, 0, 1)]
    assert all(len({values[source] for values in drawn}) == 4 for source in range(3))
