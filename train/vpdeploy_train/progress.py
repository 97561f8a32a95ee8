"""How training tells what it is doing."""

from __future__ import annotations

import logging
import math
import time
from types import TracebackType
from typing import Protocol

from vpdeploy.progress import ProgressBar
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
        """An epoch is complete and stored; epoch 0 is the start, which was validated before the first step."""
        ...


class ConsoleProgress:
    """One line an epoch on stderr and, where it is a terminal, a progress bar below them.

    Args:
        title: Shown before the bar.
        images: Images in the whole phase.
        done: Images of the epochs that were done before a resume.
    """

    def __init__(self, title: str, *, images: int, done: int = 0) -> None:
        self._title = title
        self._images = images
        self._done = self._begun_with = done
        self._started_at = time.monotonic()
        self._bar = ProgressBar(title)
        self._bar.show(done / images)

    def __enter__(self) -> ConsoleProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    def on_batch(self, images: int, *, loss: float, accuracy: float) -> None:
        """See ``Progress``."""
        self._done += images
        rate = (self._done - self._begun_with) / max(time.monotonic() - self._started_at, 1e-9)
        self._bar.show(self._done / self._images, f"loss {loss:.3f}, accuracy {accuracy:.3f}, {rate:.0f} images/s")

    def on_epoch(self, row: EpochRow) -> None:
        """See ``Progress``."""
        line = f"{self._title}: {describe_epoch(row)}"
        if self._bar.on_terminal:
            self._bar.print_line(line)
        else:
            logger.info("%s", line)


def describe_epoch(row: EpochRow) -> str:
    """Return what an epoch came to, in a short line."""
    validated = (
        "no validation"
        if math.isnan(row.val_loss)
        else f"validation loss {row.val_loss:.4f}, accuracy {row.val_accuracy:.4f}"
    )
    if row.epoch == 0:
        return f"start: {validated}"
    trained = f"loss {row.train_loss:.4f}, accuracy {row.train_accuracy:.4f}"
    return f"epoch {row.epoch}: {trained}, {validated}, {row.images_per_second:.0f} images/s"
