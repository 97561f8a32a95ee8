import multiprocessing
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from vpdeploy.errors import SpecError
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy_train.data import CacheBudget, EpochLoader, Example, ImageDataset, build_augmentation

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


@pytest.fixture
def worker_ids(tmp_path, monkeypatch):
    """Let every draw note its process; returns what reads the notes."""
    notes = tmp_path / "processes.txt"
    draw = ImageDataset.draw

    def note(self, index, *, epoch):
        if get_worker_info() is not None:
            with notes.open("a") as stream:
                stream.write(f"{os.getpid()}\n")
        return draw(self, index, epoch=epoch)

    monkeypatch.setattr(ImageDataset, "draw", note)
    return lambda: notes.read_text().split()


def load(dataset, batch_size, *, shuffle_seed, epoch, **options):
    return EpochLoader(dataset, batch_size, **options).iterate(shuffle_seed=shuffle_seed, epoch=epoch)


def labels(loader):
    return [label for _, batch in loader for label in batch.tolist()]


def pixels(loader):
    return torch.cat([batch for batch, _ in loader])


def test_batches_are_uint8_pixels_and_int64_labels_and_the_last_is_kept(dataset):
    batches = list(load(dataset, 4, shuffle_seed=None, epoch=0, workers=0))
    assert [tuple(batch.shape) for batch, _ in batches] == [(4, 16, 16, 3), (4, 16, 16, 3), (3, 16, 16, 3)]
    assert batches[0][0].dtype == torch.uint8
    assert batches[0][1].dtype == torch.int64


def test_without_a_seed_the_order_is_that_of_the_data_set(dataset):
    assert labels(load(dataset, 4, shuffle_seed=None, epoch=3)) == list(range(11))


def test_the_order_depends_on_seed_and_epoch_alone(dataset):
    torch.manual_seed(1)
    first = labels(load(dataset, 4, shuffle_seed=0, epoch=0))
    torch.manual_seed(2)
    assert labels(load(dataset, 3, shuffle_seed=0, epoch=0)) == first
    assert sorted(first) == list(range(11))
    others = [labels(load(dataset, 4, shuffle_seed=seed, epoch=epoch)) for seed, epoch in [(0, 1), (1, 0)]]
    assert first not in others
    assert others[0] != others[1]


def test_one_loader_gives_the_same_epoch_every_time(dataset):
    loader = EpochLoader(dataset, 4)
    first, again = (list(loader.iterate(shuffle_seed=0, epoch=2)) for _ in range(2))
    assert labels(first) == labels(again)
    assert (pixels(first) == pixels(again)).all()


def test_the_epoch_varies_the_images(dataset):
    first, second, again = (pixels(load(dataset, 4, shuffle_seed=None, epoch=epoch)) for epoch in (0, 1, 0))
    assert (first == again).all()
    assert (first != second).any()


def test_the_number_of_workers_changes_nothing(dataset):
    alone = pixels(load(dataset, 4, shuffle_seed=9, epoch=1, workers=0))
    for workers in (1, 64):  # no more are started than there are CPUs
        assert (pixels(load(dataset, 4, shuffle_seed=9, epoch=1, workers=workers)) == alone).all()


def test_the_global_random_state_is_left_alone(dataset):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    pixels(load(dataset, 4, shuffle_seed=0, epoch=0))
    assert (torch.rand(3) == expected).all()


def test_no_workers_are_started_where_the_cache_holds_everything(dataset):
    assert EpochLoader(dataset, 4).workers == 0
    large = ImageDataset(dataset._examples, PREPROCESSING, budget=CacheBudget(100))
    assert EpochLoader(large, 4).workers >= 1


def test_workers_live_through_all_epochs_and_learn_which_it_is(dataset, worker_ids):
    loader, plain = EpochLoader(dataset, 4, workers=1), EpochLoader(dataset, 4, workers=0)
    for epoch in (0, 1, 0):
        expected = list(plain.iterate(shuffle_seed=3, epoch=epoch))
        found = list(loader.iterate(shuffle_seed=3, epoch=epoch))
        assert labels(found) == labels(expected)
        assert (pixels(found) == pixels(expected)).all()
    assert len(set(worker_ids())) == 1


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="only forked workers share memory")
def test_forked_workers_use_the_images_that_are_in_memory(dataset):
    expected = pixels(load(dataset, 4, shuffle_seed=0, epoch=0, workers=0))
    for example in dataset._examples:
        example.source.unlink()
    assert (pixels(load(dataset, 4, shuffle_seed=0, epoch=0, workers=1)) == expected).all()


def test_an_epoch_that_was_left_early_does_not_reach_into_the_next(dataset):
    loader = EpochLoader(dataset, 2, workers=1)
    next(loader.iterate(shuffle_seed=None, epoch=0))
    assert labels(loader.iterate(shuffle_seed=None, epoch=1)) == list(range(11))


@pytest.mark.parametrize("workers", [0, 1])
def test_two_epochs_may_be_read_at_the_same_time(dataset, workers):
    loader = EpochLoader(dataset, 4, workers=workers)
    pairs = list(zip(*(loader.iterate(shuffle_seed=None, epoch=0) for _ in range(2)), strict=True))
    assert labels(first for first, _ in pairs) == labels(second for _, second in pairs) == list(range(11))


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_that_are_prepared_ahead_for_a_gpu_are_the_same(dataset, workers):
    plain = list(EpochLoader(dataset, 4, workers=0).iterate(shuffle_seed=1, epoch=1))
    ahead = list(EpochLoader(dataset, 4, workers=workers, pin_memory=True).iterate(shuffle_seed=1, epoch=1))
    assert labels(ahead) == labels(plain)
    assert (pixels(ahead) == pixels(plain)).all()


@pytest.mark.parametrize(("size", "workers", "message"), [(0, 0, "batch size is 0"), (4, -1, "workers is -1")])
def test_impossible_sizes_are_refused(dataset, size, workers, message):
    with pytest.raises(SpecError, match=message):
        EpochLoader(dataset, size, workers=workers)


@pytest.mark.parametrize("seed", [-1, 2**70])
def test_any_integer_is_a_seed(dataset, seed):
    assert sorted(labels(load(dataset, 4, shuffle_seed=seed, epoch=0))) == list(range(11))
    varied = ImageDataset(dataset._examples, PREPROCESSING, build_augmentation("crop", PREPROCESSING), seed)
    assert varied[0][0].shape == (16, 16, 3)
