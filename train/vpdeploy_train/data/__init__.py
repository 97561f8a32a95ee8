"""Data: from a spec to labelled images in three splits, and from those to batches of pixels.

What needs torch is imported when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vpdeploy.lazy import lazy_names
from vpdeploy_train.data.example import DataSource, Example
from vpdeploy_train.data.memory import CacheBudget
from vpdeploy_train.data.preload import preload_images
from vpdeploy_train.data.resolve import resolve_data

if TYPE_CHECKING:
    from vpdeploy_train.data.augmentation import AUGMENTATIONS, Augmentation, build_augmentation
    from vpdeploy_train.data.dataset import ImageDataset
    from vpdeploy_train.data.loader import EpochLoader

__all__ = [
    "AUGMENTATIONS",
    "Augmentation",
    "CacheBudget",
    "DataSource",
    "EpochLoader",
    "Example",
    "ImageDataset",
    "build_augmentation",
    "preload_images",
    "resolve_data",
]

__getattr__ = lazy_names(
    __name__,
    {
        "AUGMENTATIONS": "augmentation",
        "Augmentation": "augmentation",
        "build_augmentation": "augmentation",
        "EpochLoader": "loader",
        "ImageDataset": "dataset",
    },
)
