"""How training tells what it is doing."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

from tqdm import tqdm

from vpdeploy_train.state import EpochRow

logger = logging.getLogger("vpdeploy.train")


class Progress(Protocol):
    """Receives news of one phase; used as a context manager around it."""

    def __enter__(self) -> Progress:
        """Begin."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End, whatever happened."""
        ...

    def on_batch(self, images: int, *, loss: float, accuracy: float) -> None:
        """A step was taken on so many images; loss and accuracy are the epoch's so far."""
        ...

    def on_epoch(self, row: EpochRow) -> None:
        """An epoch is complete and stored."""
        ...


class ConsoleProgress:
    """A progress bar on stderr; where stderr is no terminal, one line an epoch instead.

    Args:
        title: Shown before the bar.
        images: Images in the whole phase.
        done: Images of epochs already done before a resume.
    """

    def __init__(self, title: str, *, images: int, done: int = 0) -> None:
        self._title = title
        self._bar = tqdm(
            total=images,
            initial=done,
            desc=title,
            unit=" images",
            file=sys.stderr,
            disable=not sys.stderr.isatty(),
            leave=False,
            dynamic_ncols=True,
        )

    def __enter__(self) -> ConsoleProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def on_batch(self, images: int, *, loss: float, accuracy: float) -> None:
        """See ``Progress``."""
        if not self._bar.disable:
            self._bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.3f}", refresh=False)
            self._bar.update(images)

    def on_epoch(self, row: EpochRow) -> None:
        """See ``Progress``."""
        if self._bar.disable:
            logger.info(
                "%s: epoch %d: loss %.4f, accuracy %.4f, %s, %.0f images/s",
                self._title,
                row.epoch,
                row.train_loss,
                row.train_accuracy,
                "no validation"
                if math.isnan(row.val_loss)
                else f"validation loss {row.val_loss:.4f}, accuracy {row.val_accuracy:.4f}",
                row.images_per_second,
            )


@contextmanager
def reading_bar() -> Iterator[Callable[[int, int], None]]:
    """Show a bar while images are read, where stderr is a terminal and it takes longer than two seconds.

    Yields:
        What to call with the number of images read and of all images.
    """
    with tqdm(
        desc="reading images", unit=" images", file=sys.stderr, disable=not sys.stderr.isatty(), leave=False, delay=2
    ) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
