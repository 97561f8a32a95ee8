"""The images of a split as tensors."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from vpdeploy.errors import InputError
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy.image import decode_image, fit_image
from vpdeploy_train.data.augmentation import Augmentation, scaled_side, seeded_randomness
from vpdeploy_train.data.example import Example, Record
from vpdeploy_train.data.memory import CacheBudget

DEFAULT_CACHE_BYTES: Final = 1 << 30


class ImageDataset(Dataset[tuple[torch.Tensor, int]]):
    """Examples as pixels of the backbone's size: ``dataset[i]`` is (uint8 [H, W, 3], label), the caller's own.

    Scaling to [0, 1] and normalisation are left to the device. How image ``i`` is varied depends on ``seed``, the
    epoch and ``i`` alone; ``dataset[i]`` is as in epoch 0. Decoded images are kept while the budget lasts: the final
    pixels where nothing varies, else the scaled image before augmentation. Worker processes that are forked find what
    was kept before; what they decode is not kept.

    Args:
        examples: The images.
        preprocessing: What the backbone expects.
        augmentation: How the images are varied; None for evaluation.
        seed: Seed of the augmentation, any integer.
        budget: Limits the decoded pixels that are kept, perhaps together with other data sets; by default 1 GiB of
            this one's own.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        preprocessing: Preprocessing,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        *,
        budget: CacheBudget | None = None,
    ) -> None:
        self._examples = tuple(examples)
        self._preprocessing = preprocessing
        self._augmentation = augmentation
        self._seed = seed % 2**64
        self.budget = budget or CacheBudget(DEFAULT_CACHE_BYTES)
        self._cache: dict[int, npt.NDArray[np.uint8]] = {}

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.draw(index, epoch=0)

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes that are not forked receive the data set pickled.
        return {**self.__dict__, "_cache": {}, "budget": CacheBudget(0)}

    def draw(self, index: int, *, epoch: int) -> tuple[torch.Tensor, int]:
        """Return an image as it is varied in an epoch, counted from 0: uint8 [H, W, 3], and its label.

        Raises:
            InputError: The image cannot be decoded.
        """
        prepared = self._cache.get(index)
        if prepared is None:
            prepared = self.prepare(index)
            self.keep(index, prepared)
        label = self._examples[index].label
        if self._augmentation is None:
            return torch.from_numpy(prepared.copy()), label
        with seeded_randomness((self._seed, epoch, index)):
            varied = self._augmentation.vary(Image.fromarray(prepared))
        return torch.from_numpy(np.array(varied, dtype=np.uint8)), label

    @property
    def fits_cache(self) -> bool:
        """Whether all images that are not kept yet are expected to be; exact where images are square."""
        each = prepared_bytes(self._preprocessing, self._augmentation)
        return (len(self) - self.kept) * each <= self.budget.free_bytes

    @property
    def kept(self) -> int:
        """Number of images that are kept in memory."""
        return len(self._cache)

    @property
    def is_encoded(self) -> bool:
        """Whether any image has to be decoded."""
        return any(not isinstance(example.source, np.ndarray) for example in self._examples)

    def missing(self) -> list[int]:
        """Return the indices of the images that are not kept."""
        return [index for index in range(len(self)) if index not in self._cache]

    def without(self, indices: Collection[int]) -> ImageDataset:
        """Return the data set without some images; what is kept of the others stays kept, in the same budget."""
        left = [index for index in range(len(self)) if index not in indices]
        fewer = ImageDataset(
            [self._examples[index] for index in left],
            self._preprocessing,
            self._augmentation,
            self._seed,
            budget=self.budget,
        )
        fewer._cache = {new: self._cache[old] for new, old in enumerate(left) if old in self._cache}
        return fewer

    def prepare(self, index: int) -> npt.NDArray[np.uint8]:
        """Decode an image and bring it to the form that is kept, uint8 [H, W, 3].

        Raises:
            InputError: The image cannot be decoded.
        """
        image = self._decode(self._examples[index])
        if self._augmentation is None:
            return fit_image(image, self._preprocessing)
        return np.array(self._augmentation.prepare(image), dtype=np.uint8)

    def keep(self, index: int, prepared: npt.NDArray[np.uint8]) -> None:
        """Keep prepared pixels where there is room for them; what a worker process kept would be lost."""
        if index not in self._cache and get_worker_info() is None and self.budget.take(prepared.nbytes):
            self._cache[index] = prepared

    def _decode(self, example: Example) -> Image.Image:
        """Decode an example, at a reduced scale where that is enough."""
        side = self._preprocessing.image_size / self._preprocessing.crop_ratio
        if self._augmentation is not None:
            side = max(side, scaled_side(self._preprocessing))
        if isinstance(example.source, Path):
            return decode_image(example.source, shorter_side=round(side))
        if isinstance(example.source, Record):
            try:
                return decode_image(example.source.read(), shorter_side=round(side))
            except InputError as error:
                raise InputError(f"{example.source.name}: {str(error).removeprefix('image: ')}") from error
        return Image.fromarray(example.source)


def prepared_bytes(preprocessing: Preprocessing, augmentation: Augmentation | None) -> int:
    """Return the bytes of an image in the form that is kept; exact where images are square."""
    side = preprocessing.image_size
    if augmentation is not None:
        side = max(side, scaled_side(preprocessing))
    return side * side * 3
