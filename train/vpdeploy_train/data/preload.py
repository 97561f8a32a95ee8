"""Reading every image once before training: damaged ones are found, the others kept where there is room."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from vpdeploy.errors import InputError
from vpdeploy.machine import usable_cores

if TYPE_CHECKING:
    from vpdeploy_train.data.dataset import ImageDataset

_log = logging.getLogger("vpdeploy.train")

_NAMED: Final = 3
_IN_FLIGHT: Final = 8  # decoded images that wait for each thread
_MOST_THREADS: Final = 16  # a 12-megapixel image takes 36 MB while it is decoded


@dataclass(frozen=True, kw_only=True)
class Damage:
    """An image that cannot be used.

    Attributes:
        dataset: Which of the data sets it belongs to, counted from 0.
        index: Its index there.
        reason: What is wrong with it; names the image.
    """

    dataset: int
    index: int
    reason: str


def preload_images(
    datasets: Sequence[ImageDataset],
    *,
    on_progress: Callable[[int, int], None] | None = None,
    threads: int | None = None,
) -> None:
    """Decode every image of some data sets once, and keep what their caches have room for.

    Args:
        datasets: The data sets; the first ones' images are kept first.
        on_progress: Called in this thread with the number of images read and of all images.
        threads: Number of decoding threads; by default ``decoding_threads()``.

    Raises:
        InputError: Images cannot be decoded; the message counts them all and names the first three.
    """
    damaged = _read(datasets, on_progress, threads)
    if damaged:
        raise InputError(
            f"{len(damaged)} of {sum(map(len, datasets))} images cannot be used: replace or remove them, or leave "
            f"them out with --skip-corrupt: {list_damaged(damaged)}"
        )
    _report(datasets)


def preload_sound_images(
    datasets: Sequence[ImageDataset],
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[list[ImageDataset], list[Damage]]:
    """Do as ``preload_images`` does, and leave out the images that cannot be decoded.

    Args:
        datasets: The data sets; the first ones' images are kept first.
        on_progress: Called in this thread with the number of images read and of all images.

    Returns:
        The data sets without their damaged images, and what is wrong with these, in the data sets' order.
    """
    damaged = _read(datasets, on_progress, None)
    sound = [
        dataset.without({each.index for each in damaged if each.dataset == number})
        for number, dataset in enumerate(datasets)
    ]
    _report(sound)
    return sound, damaged


def decoding_threads() -> int:
    """Return how many threads decode images where nobody says: one for each CPU, up to a bound."""
    return min(usable_cores(), _MOST_THREADS)


def tell_damaged(damaged: Sequence[Damage]) -> None:
    """Warn, in one line, of the images that are left out, where there are some."""
    if damaged:
        whose = f"{len(damaged)} damaged images are" if len(damaged) > 1 else "1 damaged image is"
        _log.warning("%s left out: %s", whose, list_damaged(damaged))


def list_damaged(damaged: Sequence[Damage]) -> str:
    """Return what is wrong with the first three images and how many more there are, in one line."""
    others = f"; and {len(damaged) - _NAMED} more" if len(damaged) > _NAMED else ""
    return "; ".join(each.reason for each in damaged[:_NAMED]) + others


def _read(
    datasets: Sequence[ImageDataset], on_progress: Callable[[int, int], None] | None, threads: int | None
) -> list[Damage]:
    """Decode every image that is not kept yet, keep what the caches have room for, and return what is damaged."""
    waiting = [(number, index) for number, dataset in enumerate(datasets) for index in dataset.missing()]
    damaged: list[Damage] = []
    prepared = _prepare([(datasets[number], index) for number, index in waiting], threads or decoding_threads())
    for done, ((number, index), result) in enumerate(zip(waiting, prepared, strict=True), start=1):
        if isinstance(result, InputError):
            damaged.append(Damage(dataset=number, index=index, reason=str(result)))
        else:
            datasets[number].keep(index, result)
        if on_progress is not None:
            on_progress(done, len(waiting))
    return damaged


def _prepare(waiting: Sequence[tuple[ImageDataset, int]], threads: int) -> Iterator[npt.NDArray[np.uint8] | InputError]:
    """Yield, in their order, the prepared pixels of images, or what is wrong with them."""

    def prepare(place: tuple[ImageDataset, int]) -> npt.NDArray[np.uint8] | InputError:
        dataset, index = place
        try:
            return dataset.prepare(index)
        except InputError as error:
            return error

    # Each thread holds one image at full size; a few small ones wait for each, as there may be more than memory.
    places = iter(waiting)
    with ThreadPoolExecutor(threads) as pool:
        begun = deque(pool.submit(prepare, place) for place in islice(places, threads * _IN_FLIGHT))
        try:
            while begun:
                yield begun.popleft().result()
                begun.extend(pool.submit(prepare, place) for place in islice(places, 1))
        finally:
            for future in begun:
                future.cancel()


def _report(datasets: Sequence[ImageDataset]) -> None:
    """Log what was kept, where images came from files."""
    if not any(dataset.is_encoded for dataset in datasets):
        return
    images, kept = sum(len(dataset) for dataset in datasets), sum(dataset.kept for dataset in datasets)
    budget = datasets[0].budget
    sizes = f"{budget.kept_bytes / 2**20:,.0f} MiB of the {budget.limit_bytes / 2**20:,.0f} MiB that they may take"
    if kept == images:
        _log.info("%d images read and kept in memory (%s)", images, sizes)
    else:
        _log.info("%d images read, %d kept in memory (%s); the others are decoded in every epoch", images, kept, sizes)
