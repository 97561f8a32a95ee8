"""Batches of a data set, in an order that a seed decides."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch.utils.data import DataLoader

from vpdeploy.errors import SpecError
from vpdeploy_train.data.dataset import ImageDataset

_MAX_DEFAULT_WORKERS: Final = 8


def make_loader(
    dataset: ImageDataset,
    batch_size: int,
    *,
    shuffle_seed: int | None,
    epoch: int,
    workers: int | None = None,
) -> DataLoader[tuple[torch.Tensor, int]]:
    """Return the batches of one epoch: pixels uint8 [B, H, W, 3] and labels int64 [B].

    The last batch may be smaller. The data set is set to the epoch; the global random states are left alone.

    Args:
        dataset: The images.
        batch_size: Images in a batch, B.
        shuffle_seed: Together with ``epoch`` decides the order, any integer; None keeps the data set's order.
        epoch: The epoch, counted from 0.
        workers: Decoding processes; by default none where the data set's cache holds every image. More than the
            machine has CPUs are not started.

    Raises:
        SpecError: ``batch_size`` or ``workers`` is too small.
    """
    if batch_size < 1:
        raise SpecError(f"the batch size is {batch_size}; expected at least 1")
    if workers is not None and workers < 0:
        raise SpecError(f"the number of workers is {workers}; expected at least 0")
    cpus = _count_cpus()
    if workers is None:
        workers = 0 if dataset.fits_cache else min(_MAX_DEFAULT_WORKERS, cpus)
    dataset.set_epoch(epoch)
    seed = int(np.random.SeedSequence(((shuffle_seed or 0) % 2**64, epoch)).generate_state(1, np.uint64)[0])
    generator = torch.Generator().manual_seed(seed)
    order: Sequence[int] = range(len(dataset))
    if shuffle_seed is not None:
        order = torch.randperm(len(dataset), generator=generator).tolist()
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=order,
        num_workers=min(workers, cpus),
        pin_memory=torch.cuda.is_available(),
        generator=generator,
    )


def _count_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
