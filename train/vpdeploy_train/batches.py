"""Batches of normalised pixels on the device that computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor

from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy_train.data import EpochLoader, ImageDataset
from vpdeploy_train.prompted import normalise_pixels


@dataclass(frozen=True, kw_only=True)
class Batches:
    """One split, ready to be iterated any number of times.

    Attributes:
        dataset: The images, uint8.
        preprocessing: How images reach the backbone; its mean and standard deviation are applied on the device.
        batch_size: Images in a batch, B; the last batch may be smaller.
        device: The device that batches are moved to.
        workers: Number of decoding processes; None starts as many as help.
    """

    dataset: ImageDataset
    preprocessing: Preprocessing
    batch_size: int
    device: torch.device
    workers: int | None = None

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalised images [B, 3, H, W] and labels [B] in the data set's order, the same in every epoch."""
        return self._iterate(shuffle_seed=None, epoch=0)

    def shuffled(self, *, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches in the order, and with the augmentation, that the seed and the epoch determine."""
        return self._iterate(shuffle_seed=seed, epoch=epoch)

    def sample(self, images: int, *, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of about so many images in a seeded order, all of them if there are no more."""
        return islice(self.shuffled(seed=seed, epoch=0), -(-images // self.batch_size))

    @cached_property
    def _loader(self) -> EpochLoader:
        """The loader, made when it is first needed: by then it is known which images are in memory."""
        return EpochLoader(self.dataset, self.batch_size, workers=self.workers, pin_memory=self.device.type == "cuda")

    def _iterate(self, *, shuffle_seed: int | None, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        mean = torch.tensor(self.preprocessing.mean, device=self.device)
        std = torch.tensor(self.preprocessing.std, device=self.device)
        for pixels, labels in self._loader.iterate(shuffle_seed=shuffle_seed, epoch=epoch):
            pixels = pixels.to(self.device, non_blocking=True)
            yield normalise_pixels(pixels, mean, std), labels.to(self.device, non_blocking=True)
