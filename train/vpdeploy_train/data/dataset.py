"""The images of a split as tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from vpdeploy.image import decode_image, fit_image
from vpdeploy.preprocessing import Preprocessing
from vpdeploy_train.data.augmentation import Augmentation, scaled_side, seeded_randomness
from vpdeploy_train.data.example import Example

DEFAULT_CACHE_BYTES: Final = 1 << 30


class ImageDataset(Dataset[tuple[torch.Tensor, int]]):
    """Examples as pixels of the backbone's size: ``dataset[i]`` is (uint8 [H, W, 3], label), the caller's own.

    Scaling to [0, 1] and normalisation are left to the device. How image ``i`` is varied depends on ``seed``, the
    epoch and ``i`` alone. Decoded images are kept, up to ``cache_bytes``: the final pixels where nothing varies, else
    the scaled image before augmentation. The cache belongs to one process and is not sent to workers.

    Args:
        examples: The images.
        preprocessing: What the backbone expects.
        augmentation: How the images are varied; None for evaluation.
        seed: Seed of the augmentation, any integer.
        cache_bytes: Bytes of decoded pixels to keep; 0 keeps none.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        preprocessing: Preprocessing,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        *,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        self._examples = tuple(examples)
        self._preprocessing = preprocessing
        self._augmentation = augmentation
        self._seed = seed % 2**64
        self._epoch = 0
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._cache: dict[int, npt.NDArray[np.uint8]] = {}

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        example = self._examples[index]
        prepared = self._cache.get(index)
        if prepared is None:
            prepared = self._prepare(example)
            self._keep(index, prepared)
        if self._augmentation is None:
            return torch.from_numpy(prepared.copy()), example.label
        with seeded_randomness((self._seed, self._epoch, index)):
            varied = self._augmentation.vary(Image.fromarray(prepared))
        return torch.from_numpy(np.array(varied, dtype=np.uint8)), example.label

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes that are not forked receive the data set pickled.
        return {**self.__dict__, "_cache": {}, "_cached_bytes": 0}

    @property
    def fits_cache(self) -> bool:
        """Whether the cache is expected to hold every image; exact where images are square."""
        side = self._preprocessing.image_size
        if self._augmentation is not None:
            side = max(side, scaled_side(self._preprocessing))
        return len(self) * side * side * 3 <= self._cache_bytes

    def set_epoch(self, epoch: int) -> None:
        """Vary the images as in the given epoch, counted from 0."""
        self._epoch = epoch

    def preload(self, *, on_progress: Callable[[int, int], None] | None = None, threads: int | None = None) -> None:
        """Decode, with several threads, what the cache has room for.

        Args:
            on_progress: Called in this thread with the number of images done and of all images.
            threads: Number of decoding threads; by default one for each CPU.

        Raises:
            InputError: An image cannot be decoded.
        """
        waiting = [index for index in range(len(self)) if index not in self._cache]
        threads = threads or os.cpu_count() or 1
        with ThreadPoolExecutor(threads) as pool:
            # In chunks, so that images the cache has no room for are not decoded.
            for start in range(0, len(waiting), 8 * threads):
                chunk = waiting[start : start + 8 * threads]
                prepared = pool.map(self._prepare, [self._examples[index] for index in chunk])
                kept = [self._keep(index, pixels) for index, pixels in zip(chunk, prepared, strict=True)]
                if on_progress is not None:
                    on_progress(len(self) - len(waiting) + start + len(chunk), len(self))
                if not all(kept):
                    break

    def _prepare(self, example: Example) -> npt.NDArray[np.uint8]:
        """Decode an example and bring it to the form that is kept, uint8 [H, W, 3]."""
        if isinstance(example.source, Path):
            side = self._preprocessing.image_size / self._preprocessing.crop_ratio
            if self._augmentation is not None:
                side = max(side, scaled_side(self._preprocessing))
            image = decode_image(example.source, shorter_side=round(side))
        else:
            image = Image.fromarray(example.source)
        if self._augmentation is None:
            return fit_image(image, self._preprocessing)
        return np.array(self._augmentation.prepare(image), dtype=np.uint8)

    def _keep(self, index: int, prepared: npt.NDArray[np.uint8]) -> bool:
        """Keep prepared pixels where there is room for them; what a worker process kept would be lost."""
        if get_worker_info() is not None or self._cached_bytes + prepared.nbytes > self._cache_bytes:
            return False
        self._cache[index] = prepared
        self._cached_bytes += prepared.nbytes
        return True
