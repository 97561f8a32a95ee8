"""Data: from a spec to labelled images in three splits, and from those to batches of pixels.

What needs torch is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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


_LATE = {
    "AUGMENTATIONS": "augmentation",
    "Augmentation": "augmentation",
    "build_augmentation": "augmentation",
    "EpochLoader": "loader",
    "ImageDataset": "dataset",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_LATE[name]}"), name)
