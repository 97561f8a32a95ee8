"""``--lr auto``: a short range test on training images, after which a run has a rate like any other."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice, takewhile
from typing import Final

import torch
from lightning_fabric import Fabric
from torch import Tensor

from vpdeploy.errors import SpecError, TrainingError
from vpdeploy.progress import ProgressBar
from vpdeploy_train.batches import Batches
from vpdeploy_train.loop import load_stored, make_optimizer, phase_seed, take_step, training_loss
from vpdeploy_train.objective import Objective
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.settings import TrainSettings

logger = logging.getLogger("vpdeploy.train")

LEAST_IMAGES: Final = 16
"""Fewer training images say nothing of a rate."""

STEPS: Final = 60
SPAN: Final = (1e-3, 1e2)
"""The rates that are tried, as multiples of the method's own."""

_SMOOTHING: Final = 0.8
_DIVERGED: Final = 4.0
_SHARE: Final = 0.2
_AT_FIRST: Final = 5
_LEAST_RISE: Final = 0.05
_NAME: Final = "range-test"


@dataclass(frozen=True, kw_only=True)
class FoundRate:
    """What a range test found.

    Attributes:
        lr: The rate, for batches of 256 images.
        reason: Why this one, in a line.
    """

    lr: float
    reason: str


def find_rate(
    model: PromptedViT, train: Batches, *, settings: TrainSettings, objective: Objective, fabric: Fabric
) -> FoundRate:
    """Choose a learning rate by training a few steps at rates that rise exponentially.

    This is the range test of Smith (Cyclical Learning Rates, arXiv 1506.01186, section 3.3). The rule is close to that
    which fastai's ``lr_find`` calls the minimum, a tenth of the rate at which the loss is least; but a training that
    starts at a linear probe has hardly a minimum, only a rate that it does not stand. Everything depends on the
    settings and the seed, so a test that is interrupted is simply made again. Validation images are not looked at.

    Args:
        model: At the values that training starts from; it has them again afterwards.
        train: Training images.
        settings: The run's settings.
        objective: What training steps minimise.
        fabric: What casts to the precision and scales the gradients.

    Raises:
        SpecError: There are too few training images.
        TrainingError: The loss is not finite at the lowest rate.
    """
    if len(train.dataset) < LEAST_IMAGES:
        raise SpecError(
            f"--lr auto: {len(train.dataset)} training images are too few to try rates on, {LEAST_IMAGES} at least; "
            "give a number, or leave --lr away for the method's own rate"
        )

    # Rates evenly spaced in their logarithm around the method's own, one for each step.
    low, high = (settings.base_lr * end for end in SPAN)
    rates = [low * (high / low) ** (step / (STEPS - 1)) for step in range(STEPS)]
    initial = model.trained_state()
    scaler = fabric.strategy.precision.state_dict()

    # Train through them; whatever happens, the model and the scaler end as they began.
    try:
        losses = list(_losses(model, train, rates, settings=settings, objective=objective, fabric=fabric))
    finally:
        load_stored(model, initial, phase=_NAME)
        fabric.strategy.precision.load_state_dict(scaler)
    found = choose_rate(rates, losses)
    logger.info("--lr auto: %.3g, %s", found.lr, found.reason)
    return found


def choose_rate(rates: Sequence[float], losses: Sequence[float]) -> FoundRate:
    """Return the rate that a test's losses speak for: a fifth of the highest that the training stood.

    It stood a rate where the smoothed loss was above its least by no more than half of the loss at the lowest rates.

    Args:
        rates: The rates that were tried, rising.
        losses: The loss of each step, before it was taken; fewer than the rates where the training diverged.

    Raises:
        TrainingError: Not even the first loss is finite.
    """
    finite = list(takewhile(math.isfinite, losses))
    if not finite:
        raise TrainingError(
            f"--lr auto: the loss is not finite at the lowest rate, {rates[0]:.3g}; "
            "use --precision fp32, and check the images and the backbone's weights"
        )
    curve = smoothed(finite)
    start = sum(finite[:_AT_FIRST]) / len(finite[:_AT_FIRST])
    bound = min(curve) + max(start / 2, _LEAST_RISE)
    stood = max(step for step, loss in enumerate(curve) if loss <= bound)
    rose = "the loss had not risen at the highest rate" if stood == len(rates) - 1 else "then the loss rose"
    return FoundRate(
        lr=float(f"{rates[stood] * _SHARE:.3g}"),
        reason=f"a fifth of {rates[stood]:.3g}, the highest rate that the training stood "
        f"(training loss {start:.3g} at first, {min(curve):.3g} at its least; {rose})",
    )


def smoothed(losses: Sequence[float]) -> list[float]:
    """Return running means of losses, the latest counting most, without a pull towards zero at the beginning."""
    means, mean = [], 0.0
    for step, loss in enumerate(losses, start=1):
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * loss
        means.append(mean / (1 - _SMOOTHING**step))
    return means


def _losses(
    model: PromptedViT,
    train: Batches,
    rates: Sequence[float],
    *,
    settings: TrainSettings,
    objective: Objective,
    fabric: Fabric,
) -> Iterator[float]:
    """Yield the loss of each step, and take it at its rate; end where the training has diverged."""
    seed = phase_seed(settings.seed, _NAME)
    optimizer = make_optimizer(model, settings, settings.pace(steps_per_epoch=len(train), lr=1.0))
    unit = [group["lr"] for group in optimizer.param_groups]
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    wrapped.train()
    torch.manual_seed(seed)
    seen: list[float] = []
    with ProgressBar("trying learning rates") as bar:
        for rate, (pixels, labels) in zip(rates, _endless(train, seed), strict=False):
            # The loss before the step: what the rates so far have come to.
            for group, lr in zip(optimizer.param_groups, unit, strict=True):
                group["lr"] = lr * rate
            _, loss = training_loss(wrapped, model.method, objective, pixels, labels)
            seen.append(float(loss.detach()))
            yield seen[-1]

            # A loss that is far above the least, or no number, will not come back.
            curve = smoothed(seen)
            if not math.isfinite(curve[-1]) or curve[-1] > _DIVERGED * min(curve):
                return
            take_step(wrapped, wrapped_optimizer, loss, fabric=fabric, grad_clip=settings.grad_clip)
            bar.show(len(seen) / len(rates))


def _endless(train: Batches, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled training batches, epoch after epoch, without the last one of an epoch where it is small."""
    for epoch in count():
        yield from islice(train.shuffled(seed=seed, epoch=epoch), max(1, len(train.dataset) // train.batch_size))
