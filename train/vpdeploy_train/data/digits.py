"""scikit-learn's handwritten digits, and the tasks made of them: small real images that need no download."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from vpdeploy.errors import MissingExtraError
from vpdeploy_train.data.collection import Collection, Format, Item
from vpdeploy_train.data.example import Example
from vpdeploy_train.data.partition import carve

_LOOPS = (1, 0, 0, 0, 1, 0, 1, 0, 2, 1)

TASKS: Final[Mapping[str, Callable[[int], str]]] = {
    "digits": str,
    "digits:parity": lambda digit: ("even", "odd")[digit % 2],
    "digits:loops": lambda digit: ("0 loops", "1 loop", "2 loops")[_LOOPS[digit]],
}
"""The class of each digit, by task; ``loops`` counts the closed curves of its printed form."""

_SPLIT_SEED = 20_230_713


def read_digits(spec: str) -> Collection:
    """Read the 1,797 digits, 8×8 pixels, white on black.

    The splits (60 % train, 20 % val, 20 % test, stratified by digit) are fixed, and the same images for all tasks.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise MissingExtraError("sklearn", "train") from None
    bunch = load_digits()
    grey = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    pixels = np.repeat(grey[..., None], 3, axis=-1)
    pixels.flags.writeable = False
    numbered = [Example(source=pixels[row], label=int(digit)) for row, digit in enumerate(bunch.target)]
    rest, test = carve(numbered, 0.2, seed=_SPLIT_SEED)
    train, val = carve(rest, 0.25, seed=_SPLIT_SEED)
    name = TASKS[spec]
    return Collection(
        splits={
            split: tuple(Item(source=example.source, class_name=name(example.label)) for example in part)
            for split, part in {"train": train, "val": val, "test": test}.items()
        },
        augmentation="none",
    )


FORMAT: Final = Format(
    spelling="digits",
    names=tuple(TASKS),
    matches=lambda spec: spec.split(":")[0] == "digits",
    locate=lambda spec: None,
    read=read_digits,
)
