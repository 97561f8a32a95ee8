"""How a trial ended: what the study records of it, and by what trials are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from vpdeploy.errors import SpecError
from vpdeploy_train.results import TrainingResult

_LOSS, _PARAMETERS, _BYTES = "val_loss", "parameters", "bytes"


@dataclass(frozen=True, kw_only=True)
class TrialOutcome:
    """What a complete trial reached, and with how large a prompt set.

    Attributes:
        val_accuracy: Validation accuracy of the chosen epoch, in [0, 1]: the objective.
        val_loss: Its validation loss.
        parameters: The papers' count of its prompts.
        size_bytes: Bytes of the stored prompt tensors.
    """

    val_accuracy: float
    val_loss: float
    parameters: int
    size_bytes: int

    @classmethod
    def of(cls, result: TrainingResult) -> TrialOutcome:
        """Return the outcome of a trial's training.

        Raises:
            SpecError: Nothing was validated, so there is nothing to compare trials by.
        """
        validation, prompts = result.validation, result.prompts
        if validation is None or prompts.size_bytes is None:
            raise SpecError(f"{result.run.path}: was not validated; leave #final away")
        return cls(
            val_accuracy=validation.accuracy,
            val_loss=validation.loss,
            parameters=prompts.parameters,
            size_bytes=prompts.size_bytes,
        )

    @classmethod
    def stored(cls, trial: FrozenTrial) -> TrialOutcome | None:
        """Return what the study has recorded of a trial; None where it is not complete."""
        if trial.state is not TrialState.COMPLETE or trial.value is None:
            return None
        return cls(
            val_accuracy=trial.value,
            val_loss=trial.user_attrs[_LOSS],
            parameters=trial.user_attrs[_PARAMETERS],
            size_bytes=trial.user_attrs[_BYTES],
        )

    @property
    def rank(self) -> tuple[float, ...]:
        """Sort key, larger is better: the accuracy, then the lower loss, then the smaller prompt set."""
        return (self.val_accuracy, -self.val_loss, -self.parameters)

    def record(self, study: Study, trial: Trial) -> None:
        """Complete a trial with this outcome."""
        trial.set_user_attr(_LOSS, self.val_loss)
        trial.set_user_attr(_PARAMETERS, self.parameters)
        trial.set_user_attr(_BYTES, self.size_bytes)
        study.tell(trial, self.val_accuracy)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; a row of ``trials.csv`` holds these fields."""
        return {
            "val_accuracy": self.val_accuracy,
            _LOSS: self.val_loss,
            _PARAMETERS: self.parameters,
            _BYTES: self.size_bytes,
        }
