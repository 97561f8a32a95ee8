"""What a resumed run needs: one file for each phase, replaced after every epoch."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from vpdeploy.errors import TrainingError
from vpdeploy.files import write_atomically
from vpdeploy_train.pace import Pace


@dataclass(frozen=True, kw_only=True)
class EpochRow:
    """One line of ``history.csv``.

    Attributes:
        phase: ``train``, or ``prune-1``, ``prune-2``, ... for the retrainings of the pruning search.
        epoch: Counted from 1; 0 is the start, before the first step: its ``lr``, training columns and images per second
            are NaN.
        lr: Learning rate of the epoch's last step.
        train_loss: Mean training loss over the epoch, with its class weights and label smoothing.
        train_accuracy: In [0, 1].
        val_loss: Mean cross-entropy over the validation images; NaN where there are none.
        val_accuracy: In [0, 1]; NaN where there are no validation images.
        images_per_second: Training images; the only column that differs between equal runs.
    """

    phase: str
    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    images_per_second: float

    @classmethod
    def of_start(cls, phase: str, *, val_loss: float, val_accuracy: float) -> EpochRow:
        """Return the line of a phase's start, of which there is nothing but validation results."""
        nothing = math.nan
        return cls(
            phase=phase,
            epoch=0,
            lr=nothing,
            train_loss=nothing,
            train_accuracy=nothing,
            val_loss=val_loss,
            val_accuracy=val_accuracy,
            images_per_second=nothing,
        )


@dataclass(kw_only=True)
class PhaseState:
    """How far one phase has come.

    Attributes:
        finished: Whether the phase is over; then only ``best`` still matters.
        pace: At what rates it is trained, once it has begun.
        start: The validation results before the first step; None where the phase has not begun, or there are no
            validation images.
        history: The epochs so far.
        best_epoch: The epoch with the best validation result, counted from 1; 0 is the start. Where there are no
            validation images it is the last epoch.
        current: Trained tensors after the last epoch.
        best: Trained tensors after the best epoch.
        optimizer: Tensors of the optimizer's state by ``INDEX.NAME``, as torch counts parameters.
        scaler: State of the float16 gradient scaler; empty in other precisions.
    """

    finished: bool = False
    pace: Pace | None = None
    start: EpochRow | None = None
    history: list[EpochRow] = field(default_factory=list)
    best_epoch: int = 0
    current: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> list[EpochRow]:
        """The start, where it was validated, and the epochs so far."""
        return self.history if self.start is None else [self.start, *self.history]

    @property
    def best_row(self) -> EpochRow:
        """The epoch with the best validation result, which may be the start."""
        return next(row for row in self.rows if row.epoch == self.best_epoch)


_PARTS = ("current", "best", "optimizer")


class StateFolder:
    """The ``state/`` folder of a run.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, phase: str) -> PhaseState:
        """Return how far a phase has come; a fresh state if it has not begun.

        Raises:
            TrainingError: The file is damaged.
        """
        path = self._file(phase)
        if not path.exists():
            return PhaseState()
        try:
            with safetensors.safe_open(path, framework="pt") as opened:
                fields = json.loads(opened.metadata()["state"])
                if "pace" not in fields:
                    raise ValueError("an earlier version wrote it, whose rates it does not name")
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            rows = [EpochRow(**row) for row in fields["history"]]
            start = None if fields["start"] is None else EpochRow(**fields["start"])
            best_epoch = fields["best_epoch"]
            least = bool(rows) if start is None else 0
            if not isinstance(best_epoch, int) or not least <= best_epoch <= len(rows):
                raise ValueError(f"epoch {best_epoch} is said to be the best of {len(rows)}")
            if fields["finished"] and not rows:
                raise ValueError("it is finished and has no epochs")
            parts = {
                part: {
                    name.removeprefix(f"{part}/"): value
                    for name, value in tensors.items()
                    if name.startswith(f"{part}/")
                }
                for part in _PARTS
            }
            return PhaseState(
                finished=fields["finished"],
                pace=Pace(**fields["pace"]),
                start=start,
                history=rows,
                best_epoch=best_epoch,
                scaler=fields["scaler"],
                current=parts["current"],
                best=parts["best"],
                optimizer=parts["optimizer"],
            )
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise TrainingError(f"{path}: cannot be resumed from: {error}; delete the run and train again") from error

    def write(self, phase: str, state: PhaseState) -> None:
        """Replace a phase's file.

        Raises:
            OSError: The folder cannot be written; the previous epoch's file is untouched.
        """
        fields = {
            "finished": state.finished,
            "pace": asdict(state.pace) if state.pace is not None else {},
            "start": None if state.start is None else asdict(state.start),
            "best_epoch": state.best_epoch,
            "scaler": state.scaler,
            "history": [asdict(row) for row in state.history],
        }
        parts = ("best",) if state.finished else _PARTS
        tensors = {
            f"{part}/{name}": value.contiguous() for part in parts for name, value in getattr(state, part).items()
        }
        write_atomically(self._file(phase), safetensors.torch.save(tensors, metadata={"state": json.dumps(fields)}))

    def _file(self, phase: str) -> Path:
        return self.path / f"{phase}.safetensors"
