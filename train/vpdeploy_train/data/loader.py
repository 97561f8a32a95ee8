"""Batches of a data set, in an order that a seed decides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vpdeploy.errors import SpecError
from vpdeploy.machine import usable_cores
from vpdeploy_train.data.dataset import ImageDataset
from vpdeploy_train.data.prefetch import prefetched

_MAX_DEFAULT_WORKERS: Final = 8

LabelledPixels = tuple[torch.Tensor, torch.Tensor]
"""Pixels uint8 [B, H, W, 3] and labels int64 [B]."""

Draw = tuple[int, int]
"""An epoch and the index of an image: all that a worker process, which outlives epochs, has to be told."""


class EpochLoader:
    """The batches of any epoch of a data set; worker processes, where there are any, live as long as it does.

    Args:
        dataset: The images.
        batch_size: Images in a batch, B; the last may be smaller.
        workers: Decoding processes; by default none where the data set's cache holds every image. More than the
            machine has CPUs are not started.
        pin_memory: Prepare batches ahead, in page-locked memory, for a GPU.

    Raises:
        SpecError: ``batch_size`` or ``workers`` is too small.
    """

    def __init__(
        self, dataset: ImageDataset, batch_size: int, *, workers: int | None = None, pin_memory: bool = False
    ) -> None:
        if batch_size < 1:
            raise SpecError(f"the batch size is {batch_size}; expected at least 1")
        if workers is not None and workers < 0:
            raise SpecError(f"the number of workers is {workers}; expected at least 0")
        if workers is None:
            workers = 0 if dataset.fits_cache else default_workers()
        self.workers = min(workers, usable_cores())
        self._dataset = dataset
        self._batch_size = batch_size
        self._pin_memory = pin_memory
        self._order = _Order()
        self._lasting = self._load(self._order)
        self._busy = False

    def iterate(self, *, shuffle_seed: int | None, epoch: int) -> Iterator[LabelledPixels]:
        """Yield the batches of one epoch; the global random states are left alone.

        Args:
            shuffle_seed: Together with ``epoch`` decides the order, any integer; None keeps the data set's order.
            epoch: The epoch, counted from 0.
        """
        draws = [(epoch, index) for index in self._indices(shuffle_seed, epoch)]
        if self._busy:  # persistent workers serve one iteration at a time
            order = _Order()
            order.draws = draws
            yield from self._load(order)
            return
        self._busy = True
        try:
            self._order.draws = draws
            if self._pin_memory and not self.workers:
                with prefetched(self._lasting) as batches:
                    yield from batches
            else:
                yield from self._lasting
        finally:
            self._busy = False

    def _indices(self, shuffle_seed: int | None, epoch: int) -> Sequence[int]:
        """Return the order of the images."""
        if shuffle_seed is None:
            return range(len(self._dataset))
        seed = int(np.random.SeedSequence((shuffle_seed % 2**64, epoch)).generate_state(1, np.uint64)[0])
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = torch.randperm(len(self._dataset), generator=generator).tolist()
        return order

    def _load(self, order: _Order) -> DataLoader[tuple[torch.Tensor, int]]:
        return DataLoader(
            _Draws(self._dataset),
            batch_size=self._batch_size,
            sampler=order,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=self._pin_memory,
            generator=torch.Generator(),  # else workers would be seeded from the global one
        )


class _Order(Sampler[Draw]):
    """The order of the present epoch."""

    def __init__(self) -> None:
        self.draws: list[Draw] = []

    def __len__(self) -> int:
        return len(self.draws)

    def __iter__(self) -> Iterator[Draw]:
        return iter(self.draws)


class _Draws(Dataset[tuple[torch.Tensor, int]]):
    """A data set by epoch and index."""

    def __init__(self, dataset: ImageDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, draw: Draw) -> tuple[torch.Tensor, int]:
        epoch, index = draw
        return self._dataset.draw(index, epoch=epoch)


def default_workers() -> int:
    """Return the number of processes that decode images which are not in memory, where nobody chooses one."""
    return min(_MAX_DEFAULT_WORKERS, usable_cores())
