"""Answers: logits turned into ranked, labelled probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True)
class RankedClass:
    """One class of an answer.

    Attributes:
        label: The class's name.
        index: The class's index in the task's labels.
        probability: Softmax probability over the task's classes, in [0, 1].
    """

    label: str
    index: int
    probability: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The answer for one image.

    Attributes:
        task: The name of the task that was asked.
        ranking: The most probable classes, in falling order of probability.
    """

    task: str
    ranking: tuple[RankedClass, ...]

    @property
    def label(self) -> str:
        """Name of the most probable class."""
        return self.ranking[0].label

    @property
    def probability(self) -> float:
        """Probability of the most probable class."""
        return self.ranking[0].probability


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return softmax probabilities over the last axis, float32, of the same shape."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: npt.NDArray[np.float32] = (shifted / shifted.sum(axis=-1, keepdims=True)).astype(np.float32)
    return result


def rank_classes(task: str, labels: Sequence[str], logits: npt.NDArray[np.float32], *, top: int) -> Prediction:
    """Rank one image's classes.

    Args:
        task: The name of the task that was asked.
        labels: Class names.
        logits: float32 [C], C = len(labels).
        top: How many classes to name at most.
    """
    probabilities = softmax(logits)
    order = np.argsort(-probabilities, kind="stable")[:top]
    return Prediction(
        task=task,
        ranking=tuple(
            RankedClass(label=labels[index], index=int(index), probability=float(probabilities[index]))
            for index in order
        ),
    )
