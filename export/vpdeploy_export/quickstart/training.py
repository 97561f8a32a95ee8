"""A training of the quickstart: told in two lines, for it is one step of several there."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from vpdeploy_train.backbone import Backbone
from vpdeploy_train.progress import ConsoleProgress
from vpdeploy_train.results import TrainingResult
from vpdeploy_train.settings import TrainSettings
from vpdeploy_train.state import EpochRow
from vpdeploy_train.training import train_run
from vpdeploy_train.verdict import describe_choice


def train_quietly(settings: TrainSettings, out: Path, *, backbone: Backbone, say: Callable[[str], None]) -> None:
    """Train a task named for its folder; say no more than what it came to.

    Args:
        settings: How it is trained.
        out: The run folder.
        backbone: The frozen backbone.
        say: Told each line.

    Raises:
        VpdeployError: It cannot be trained.
    """
    with _without_news():
        result = train_run(settings, out, name=out.name, backbone=backbone, make_progress=_make_bar)
    for line in describe_training(result):
        say(f"      {line}")


def describe_training(result: TrainingResult) -> list[str]:
    """Return what a training came to: which epoch was chosen, and what pruning left."""
    lines = [] if (choice := describe_choice(result)) is None else [choice]
    if result.pruning is not None:
        before, after = result.pruning.before, result.pruning.after
        lines.append(
            f"pruned: {before.parameters:,} to {after.parameters:,} parameters, "
            f"validation accuracy {before.val_accuracy:.4f} to {after.val_accuracy:.4f}"
        )
    return lines


class _BarAlone(ConsoleProgress):
    """A progress bar without a line for each epoch."""

    def on_epoch(self, row: EpochRow) -> None:
        """Say nothing."""


def _make_bar(title: str, images: int, done: int) -> _BarAlone:
    return _BarAlone(title, images=images, done=done)


@contextlib.contextmanager
def _without_news() -> Iterator[None]:
    """Let trainings tell nothing but warnings in the block."""
    logger = logging.getLogger("vpdeploy.train")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)
