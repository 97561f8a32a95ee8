"""How fast a run moves: its learning rates, weight decay and warm-up, with nothing left to a default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_LEAST_WARMUP_STEPS: Final = 20
"""Adam's first steps are as long as its rate allows whatever the gradient, and two of them at a full rate can undo a
good backbone; a short training's tenth of the epochs has no more."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """The rates of a run, stored with its state: a resume, and every phase of pruning, takes the same.

    Attributes:
        lr: Learning rate of the prompts, for batches of 256 images.
        head_scale: The classifier's learning rate as a multiple of that.
        weight_decay: On all trained tensors but the head's bias.
        warmup_steps: Steps of linear warm-up.
        reason: Why a range test chose the rate; None where it did not choose.
    """

    lr: float
    head_scale: float
    weight_decay: float
    warmup_steps: int
    reason: str | None = None

    def step_lr(self, batch_size: int) -> float:
        """Return the learning rate of the prompts for batches of so many images: the rate grows with the batch."""
        return self.lr * batch_size / 256

    def to_fields(self) -> dict[str, float]:
        """Return the rates under the names of the settings that leave them to a default."""
        return {"lr": self.lr, "head_lr_scale": self.head_scale, "weight_decay": self.weight_decay}


def warmup_steps(warmup_epochs: float | None, *, epochs: int, steps_per_epoch: int) -> int:
    """Return the steps of linear warm-up.

    Without a choice it is a tenth of all steps, but at least 20; and never more than half of them.

    Args:
        warmup_epochs: What was asked for; None where nothing was.
        epochs: Of the whole training.
        steps_per_epoch: Batches of the training images.
    """
    if warmup_epochs is not None:
        return round(warmup_epochs * steps_per_epoch)
    steps = epochs * steps_per_epoch
    return max(round(steps / 10), min(_LEAST_WARMUP_STEPS, steps // 2))
