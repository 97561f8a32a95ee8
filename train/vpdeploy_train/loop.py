"""The training loop: one phase, from whatever its stored state is to its end."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from lightning_fabric import Fabric
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn

from vpdeploy.errors import TrainingError
from vpdeploy_train.batches import Batches
from vpdeploy_train.evaluation import evaluate
from vpdeploy_train.methods.method import PromptMethod
from vpdeploy_train.objective import Objective
from vpdeploy_train.pace import Pace
from vpdeploy_train.progress import Progress
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.settings import TrainSettings
from vpdeploy_train.state import EpochRow, PhaseState

_ADVICE = "lower --lr, set --grad-clip 1, or use --precision fp32"
_ADVICE_BEFORE = "check the backbone's weights, or use --precision fp32"


@dataclass(frozen=True, kw_only=True)
class _EpochResult:
    loss: float
    accuracy: float
    lr: float
    images_per_second: float


def fit(
    model: PromptedViT,
    train: Batches,
    val: Batches,
    *,
    phase: str,
    state: PhaseState,
    settings: TrainSettings,
    pace: Pace,
    objective: Objective,
    fabric: Fabric,
    progress: Progress,
    store: Callable[[PhaseState], None],
    until: int | None = None,
    watch: Callable[[EpochRow], None] = lambda row: None,
) -> PhaseState:
    """Train prompts and head, keep the best epoch on validation, and store the state after every epoch.

    The start is a candidate like every epoch: a training that never gets better than it ends with the start's tensors.
    Without validation images the last epoch is kept, and its validation results are NaN.

    Everything random depends on the seed, the phase's name and the epoch alone, so a run that is resumed from a stored
    state ends exactly as one that was never interrupted.

    Args:
        model: Trained in place; ends with the best epoch's tensors where the phase is finished, else the last one's.
        train: Training images.
        val: Validation images, by which the epoch is chosen.
        phase: The name of the phase in the history.
        state: Where the phase stands; ``PhaseState()`` is its beginning. It is changed in place.
        settings: The run's settings.
        pace: At what rates to train; a phase that has begun keeps its own.
        objective: What training steps minimise.
        fabric: What casts to the precision and scales the gradients.
        progress: Is told of every step and every epoch, and of the start as epoch 0.
        store: Is called with the state at the start and after every epoch.
        until: The epoch to stop after, counted from 1, on the schedule of all the settings' epochs; None trains them
            all.
        watch: Is told of every trained epoch once it is stored; what it raises ends the training there.

    Returns:
        The same state, which is finished or has reached epoch ``until``.

    Raises:
        TrainingError: The loss is not finite, where the message names epoch, step and batch; or the state is that
            of another model.
    """
    # The start is judged before anything moves.
    if state.pace is None:
        state.pace = pace
        _judge_start(model, val, phase=phase, state=state)
        store(state)
        if state.start is not None:
            progress.on_epoch(state.start)
    else:
        load_stored(model, state.current, phase=phase)

    # Set up optimizer and schedule as at the beginning, then put back what an earlier call has stored.
    seed = phase_seed(settings.seed, phase)
    optimizer = make_optimizer(model, settings, state.pace)
    schedule = _make_schedule(optimizer, settings, state.pace, len(train))
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    if state.history:
        _restore_optimizer(optimizer, state.optimizer, phase=phase)
        fabric.strategy.precision.load_state_dict(state.scaler)

    until = settings.epochs if until is None else min(until, settings.epochs)
    for epoch in range(len(state.history), until):
        if _is_over(state, settings):
            break

        # Train one epoch and validate it.
        result = _train_epoch(
            wrapped,
            wrapped_optimizer,
            model.method,
            schedule,
            train,
            epoch=epoch,
            seed=seed,
            settings=settings,
            objective=objective,
            fabric=fabric,
            progress=progress,
        )
        val_loss, val_accuracy = _validate(model, val, when=f"after epoch {epoch + 1}")
        row = EpochRow(
            phase=phase,
            epoch=epoch + 1,
            lr=result.lr,
            train_loss=result.loss,
            train_accuracy=result.accuracy,
            val_loss=val_loss,
            val_accuracy=val_accuracy,
            images_per_second=result.images_per_second,
        )

        # Note where the phase stands now; the best epoch's tensors are kept besides the last one's.
        state.history.append(row)
        state.current = model.trained_state()
        if best_of(state.rows) is row:
            state.best_epoch, state.best = row.epoch, model.trained_state()
        state.optimizer = _optimizer_tensors(optimizer)
        state.scaler = fabric.strategy.precision.state_dict()

        # Only what is stored is told: whoever is told may end the training.
        store(state)
        progress.on_epoch(row)
        watch(row)

    # A phase that has reached its last epoch ends with the best one's tensors.
    if len(state.history) < settings.epochs and not _is_over(state, settings):
        return state
    state.finished = True
    store(state)
    load_stored(model, state.best, phase=phase)
    return state


def load_stored(model: PromptedViT, tensors: dict[str, Tensor], *, phase: str) -> None:
    """Set a model's trained tensors from a stored state.

    Raises:
        TrainingError: They are those of another model.
    """
    try:
        model.load_trained_state(tensors)
    except RuntimeError as error:
        raise _foreign_state(phase, error) from error


def best_of(history: Sequence[EpochRow]) -> EpochRow:
    """Return the epoch that is best on validation, the first of equals; the last where nothing was validated.

    Args:
        history: Epochs, one at least; the start may be among them.
    """
    best = history[0]
    for row in history[1:]:
        if _is_better(row, best):
            best = row
    return best


def phase_seed(seed: int, phase: str) -> int:
    """Return the seed of one phase, which no other phase of the run has and which never changes."""
    return seed * 1_000_003 + zlib.crc32(phase.encode())


def _train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    method: PromptMethod,
    schedule: CosineLRScheduler,
    train: Batches,
    *,
    epoch: int,
    seed: int,
    settings: TrainSettings,
    objective: Objective,
    fabric: Fabric,
    progress: Progress,
) -> _EpochResult:
    model.train()
    torch.manual_seed(seed + epoch)
    started = time.perf_counter()
    total_loss, correct, seen = 0.0, 0, 0
    for batch, (pixels, labels) in enumerate(train.shuffled(seed=seed, epoch=epoch)):
        # Forward; a loss that is not finite ends the run before it spoils the tensors.
        step = epoch * len(train) + batch + 1
        schedule.step_update(step)
        logits, loss = training_loss(model, method, objective, pixels, labels)
        value = float(loss.detach())
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {value} at step {step} (epoch {epoch + 1}, batch {batch + 1} of {len(train)}); {_ADVICE}"
            )

        take_step(model, optimizer, loss, fabric=fabric, grad_clip=settings.grad_clip)

        # Sums over the epoch; the last batch may be smaller, so each image counts the same.
        total_loss += value * len(labels)
        correct += int((logits.argmax(1) == labels).sum())
        seen += len(labels)
        progress.on_batch(len(labels), loss=total_loss / seen, accuracy=correct / seen)
    return _EpochResult(
        loss=total_loss / seen,
        accuracy=correct / seen,
        lr=optimizer.param_groups[0]["lr"],
        images_per_second=seen / (time.perf_counter() - started),
    )


def training_loss(
    model: nn.Module, method: PromptMethod, objective: Objective, pixels: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a training batch's logits, [B, C], and its loss, a scalar with what the method adds.

    Args:
        model: In train mode.
        method: The model's method.
        objective: What is minimised.
        pixels: Normalised images, [B, 3, H, W].
        labels: [B].
    """
    logits: Tensor = model(pixels)
    loss = objective(logits, labels)
    extra = method.training_loss(labels)
    return logits, loss if extra is None else loss + extra


def take_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, *, fabric: Fabric, grad_clip: float
) -> None:
    """Go backward from a loss and take one step of the optimizer."""
    optimizer.zero_grad()
    fabric.backward(loss)
    if grad_clip > 0:
        fabric.clip_gradients(model, optimizer, max_norm=grad_clip, error_if_nonfinite=False)
    optimizer.step()


def make_optimizer(model: PromptedViT, settings: TrainSettings, pace: Pace) -> torch.optim.Optimizer:
    """Return the optimizer over prompts and head; the head's bias is not decayed (VPT's recipe)."""
    lr = pace.step_lr(settings.batch_size)
    head_lr = lr * pace.head_scale
    prompts = [parameter for parameter in model.method.parameters() if parameter.numel()]
    groups = [
        {"params": [model.head.weight], "lr": head_lr, "weight_decay": pace.weight_decay},
        {"params": [model.head.bias], "lr": head_lr, "weight_decay": 0.0},
    ]
    if prompts:
        groups.insert(0, {"params": prompts, "lr": lr, "weight_decay": pace.weight_decay})
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=lr)


def _make_schedule(
    optimizer: torch.optim.Optimizer, settings: TrainSettings, pace: Pace, steps_per_epoch: int
) -> CosineLRScheduler:
    """Return linear warm-up and cosine decay, stepped at every iteration; zero would be reached after the last one."""
    warmup = pace.warmup_steps
    return CosineLRScheduler(
        optimizer,
        t_initial=settings.epochs * steps_per_epoch - warmup + 1,
        warmup_t=warmup,
        warmup_lr_init=0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def _judge_start(model: PromptedViT, val: Batches, *, phase: str, state: PhaseState) -> None:
    """Note the untrained model as the best so far; only a validated one can stay the best."""
    state.current, state.best = model.trained_state(), model.trained_state()
    if len(val):
        val_loss, val_accuracy = _validate(model, val, when="before the first step", advice=_ADVICE_BEFORE)
        state.start = EpochRow.of_start(phase, val_loss=val_loss, val_accuracy=val_accuracy)


def _validate(model: PromptedViT, val: Batches, *, when: str, advice: str = _ADVICE) -> tuple[float, float]:
    """Return loss and accuracy on the validation images; NaN where there are none."""
    if not len(val):
        return math.nan, math.nan
    result = evaluate(model, val)
    if not math.isfinite(result.loss):  # the last step of an epoch has no step behind it that would notice
        raise TrainingError(f"the loss is {result.loss} on the validation images {when}; {advice}")
    return result.loss, result.accuracy


def _is_better(row: EpochRow, best: EpochRow) -> bool:
    """Tell whether an epoch replaces the best one so far; where nothing is validated, every epoch does."""
    if math.isnan(row.val_accuracy):
        return True
    return (row.val_accuracy, -row.val_loss) > (best.val_accuracy, -best.val_loss)


def _is_over(state: PhaseState, settings: TrainSettings) -> bool:
    """Tell whether early stopping has been reached: the start does not count, a training may climb back to it."""
    if not state.history:
        return False
    return 0 < settings.early_stop <= len(state.history) - best_of(state.history).epoch


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return copies of the optimizer's tensors on the CPU, by ``INDEX.NAME``."""
    return {
        f"{index}.{name}": torch.as_tensor(value).detach().to("cpu", copy=True)
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
        if value is not None
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], *, phase: str) -> None:
    """Set the optimizer's tensors; learning rates come from the schedule."""
    state: dict[int, dict[str, Tensor]] = {}
    try:
        for key, value in tensors.items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    except (ValueError, KeyError) as error:
        raise _foreign_state(phase, error) from error


def _foreign_state(phase: str, error: Exception) -> TrainingError:
    reason = " ".join(str(error).split())[:200]
    return TrainingError(f"the stored state of phase '{phase}' does not fit: {reason}; delete the run and train again")
