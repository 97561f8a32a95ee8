"""What a training came to, in words: which epoch was chosen, and what to try where none was better than the start."""

from __future__ import annotations

from typing import Final

from vpdeploy_train.phases import FIRST_PHASE
from vpdeploy_train.results import ChosenEpoch, TrainingResult, Validation

_LOWER: Final = 5


def describe_choice(result: TrainingResult) -> str | None:
    """Return which epoch was chosen, and what there was at the start; None where nothing was validated.

    Args:
        result: What a training came to.
    """
    chosen, validation = result.chosen, result.validation
    if chosen is None or validation is None:
        return None
    phase = "" if chosen.phase == FIRST_PHASE else f" of {chosen.phase}"
    if chosen.epoch == 0:
        return (
            f"chosen: the start{phase}, {_start_in_words(result, chosen)}, before any of its {chosen.epochs} epochs "
            f"(validation accuracy {validation.accuracy:.4f})"
        )
    before = (
        "" if chosen.start is None else f"; at the start, {_start_in_words(result, chosen)}, {_brief(chosen.start)}"
    )
    return (
        f"chosen: epoch {chosen.epoch} of {chosen.epochs}{phase} "
        f"(validation accuracy {validation.accuracy:.4f}{before})"
    )


def advise(result: TrainingResult) -> str | None:
    """Return what to try where training did not get better than its start; None where it did, or could not.

    A pruned result is compared with the start of the unpruned prompts.

    Args:
        result: What a training came to.
    """
    chosen, validation = result.chosen, result.validation
    if chosen is None or validation is None or chosen.first_start is None or chosen.first_start.accuracy == 1:
        return None
    if _rank(validation) > _rank(chosen.first_start):
        return None
    start = f"the start ({_brief(chosen.first_start)} on validation)"
    if not result.prompts.parameters:
        return (
            f"no epoch is better than {start}: training on from a linear probe gains nothing here; "
            "try a prompt method, such as --method e2vpt, or more images"
        )
    by_test = ", --lr auto" if chosen.lr_reason is None else ""
    return (
        f"the result is no better than {start}, the {chosen.epochs} epochs at --lr {chosen.lr:.3g} gained nothing; "
        f"try --lr {chosen.lr / _LOWER:.3g}{by_test}, more than {chosen.epochs} epochs, or more images"
    )


def _start_in_words(result: TrainingResult, chosen: ChosenEpoch) -> str:
    probed = result.run.card.details["hyperparameters"].get("head") == "probe"
    return "a linear probe" if probed and chosen.phase == FIRST_PHASE else "untrained prompts"


def _brief(validation: Validation) -> str:
    return f"{validation.accuracy:.4f}"


def _rank(validation: Validation) -> tuple[float, float]:
    return validation.accuracy, -validation.loss
