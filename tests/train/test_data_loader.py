import numpy as np
import pytest
import torch
from PIL import Image

from vpdeploy.errors import SpecError
from vpdeploy.preprocessing import Preprocessing
from vpdeploy_train.data import Example, ImageDataset, build_augmentation, make_loader

PREPROCESSING = Preprocessing(image_size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.fixture
def dataset(tmp_path):
    generator = np.random.default_rng(0)
    examples = []
    for number in range(11):
        file = tmp_path / f"{number}.png"
        Image.fromarray(generator.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(file)
        examples.append(Example(source=file, label=number))
    return ImageDataset(examples, PREPROCESSING, build_augmentation("crop-flip", PREPROCESSING), 5)


def labels(loader):
    return [label for _, batch in loader for label in batch.tolist()]


def pixels(loader):
    return torch.cat([batch for batch, _ in loader])


def test_batches_are_uint8_pixels_and_int64_labels_and_the_last_is_kept(dataset):
    batches = list(make_loader(dataset, 4, shuffle_seed=None, epoch=0, workers=0))
    assert [tuple(batch.shape) for batch, _ in batches] == [(4, 16, 16, 3), (4, 16, 16, 3), (3, 16, 16, 3)]
    assert batches[0][0].dtype == torch.uint8
    assert batches[0][1].dtype == torch.int64


def test_without_a_seed_the_order_is_that_of_the_data_set(dataset):
    assert labels(make_loader(dataset, 4, shuffle_seed=None, epoch=3)) == list(range(11))


def test_the_order_depends_on_seed_and_epoch_alone(dataset):
    torch.manual_seed(1)
    first = labels(make_loader(dataset, 4, shuffle_seed=0, epoch=0))
    torch.manual_seed(2)
    assert labels(make_loader(dataset, 3, shuffle_seed=0, epoch=0)) == first
    assert sorted(first) == list(range(11))
    others = [labels(make_loader(dataset, 4, shuffle_seed=seed, epoch=epoch)) for seed, epoch in [(0, 1), (1, 0)]]
    assert first not in others
    assert others[0] != others[1]


def test_one_loader_gives_the_same_epoch_every_time(dataset):
    loader = make_loader(dataset, 4, shuffle_seed=0, epoch=2)
    assert labels(loader) == labels(loader)
    assert (pixels(loader) == pixels(loader)).all()


def test_the_epoch_varies_the_images(dataset):
    first, second, again = (pixels(make_loader(dataset, 4, shuffle_seed=None, epoch=epoch)) for epoch in (0, 1, 0))
    assert (first == again).all()
    assert (first != second).any()


def test_the_number_of_workers_changes_nothing(dataset):
    alone = pixels(make_loader(dataset, 4, shuffle_seed=9, epoch=1, workers=0))
    for workers in (1, 64):  # no more are started than there are CPUs
        assert (pixels(make_loader(dataset, 4, shuffle_seed=9, epoch=1, workers=workers)) == alone).all()


def test_the_global_random_state_is_left_alone(dataset):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    pixels(make_loader(dataset, 4, shuffle_seed=0, epoch=0))
    assert (torch.rand(3) == expected).all()


def test_no_workers_are_started_where_the_cache_holds_everything(dataset):
    assert make_loader(dataset, 4, shuffle_seed=0, epoch=0).num_workers == 0
    large = ImageDataset(dataset._examples, PREPROCESSING, cache_bytes=100)
    assert make_loader(large, 4, shuffle_seed=0, epoch=0).num_workers >= 1


@pytest.mark.parametrize(("size", "workers", "message"), [(0, 0, "batch size is 0"), (4, -1, "workers is -1")])
def test_impossible_sizes_are_refused(dataset, size, workers, message):
    with pytest.raises(SpecError, match=message):
        make_loader(dataset, size, shuffle_seed=0, epoch=0, workers=workers)


@pytest.mark.parametrize("seed", [-1, 2**70])
def test_any_integer_is_a_seed(dataset, seed):
    assert sorted(labels(make_loader(dataset, 4, shuffle_seed=seed, epoch=0))) == list(range(11))
    varied = ImageDataset(dataset._examples, PREPROCESSING, build_augmentation("crop", PREPROCESSING), seed)
    assert varied[0][0].shape == (16, 16, 3)
