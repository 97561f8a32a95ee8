"""Linear discriminant analysis: a linear classifier in one pass, in memory linear in classes and images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

INVERSE_PENALTY: Final = 0.1
"""C of the probes: the smaller, the less sure they are."""

_SHRINKAGE: Final = 0.03
_SAMPLE: Final = 512
_SHARPNESSES: Final = 40  # each is half of the last but one, down to a millionth
_CHUNK: Final = 8_192  # rows that are widened to float64 at a time

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearClassifier:
    """Logits x Wᵀ + b for those classes that were seen.

    Attributes:
        classes: Their numbers, ascending, int64 [K].
        weight: W, float64 [K, D].
        bias: b, float64 [K].
    """

    classes: npt.NDArray[np.int64]
    weight: Floats
    bias: Floats


def fit_discriminant(
    features: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], *, balanced: bool = False
) -> LinearClassifier:
    """Fit linear discriminant analysis with a shrunken covariance.

    It is that of Hastie, Tibshirani and Friedman, The Elements of Statistical Learning (2nd edition), eq. 4.10, with
    the covariance of section 4.3.1. With features standardised by their variance over all images, class means μ_k,
    shares π_k, and S the covariance within classes,

        Σ = (1 - λ) S + λ I,    w_k = Σ⁻¹ μ_k,    b_k = -½ μ_kᵀ Σ⁻¹ μ_k + log π_k,    λ = 0.03

    Where images of a class are nearly alike, Σ is nearly λ I and the logits would be in the thousands: wrong answers
    would cost too much for training to start from. All logits are therefore multiplied by the s in (0, 1] that is best
    by the objective of logistic regression: cross-entropy, here of 512 images, and ‖W‖² / (2 C) with C = 0.1.

    It takes N D² + K D² multiply-accumulates and, beside the features, K D + D² numbers: no array has N times K.

    Args:
        features: [N, D], finite.
        labels: Class of each, [N].
        balanced: Take the K classes for equally likely, π_k = 1/K, instead of by their shares.
    """
    # Standardise by mean and deviation, in float64 and in chunks; a constant feature says nothing.
    chunks = [slice(start, start + _CHUNK) for start in range(0, len(features), _CHUNK)]
    mean = sum((features[rows].sum(0, dtype=np.float64) for rows in chunks), np.zeros(features.shape[1]))
    mean = mean / len(features)
    squares = sum(np.square(features[rows] - mean).sum(0) for rows in chunks)
    deviation = np.sqrt(squares / len(features))
    scale = np.where(deviation > 0, deviation, 1.0)

    # Class means and the scatter of everything around the overall mean.
    classes, numbers, counts = np.unique(labels, return_inverse=True, return_counts=True)
    sums, scatter = np.zeros((len(classes), len(mean))), np.zeros((len(mean), len(mean)))
    for rows in chunks:
        standard = (features[rows] - mean) / scale
        np.add.at(sums, numbers[rows], standard)
        scatter += standard.T @ standard
    means = sums / counts[:, None]

    # What is left within classes, shrunken towards the identity.
    within = (scatter - means.T @ sums) / max(len(features) - len(classes), 1)
    covariance = (1 - _SHRINKAGE) * within + _SHRINKAGE * np.eye(len(mean))
    weight = np.linalg.solve(covariance, means.T).T
    shares = np.full(len(classes), 1 / len(classes)) if balanced else counts / len(features)
    bias = np.log(shares) - (weight * means).sum(1) / 2

    # How sure it is; then the standardisation is folded back.
    sample = slice(None, None, -(-len(features) // _SAMPLE))
    scores = ((features[sample] - mean) / scale) @ weight.T + bias
    penalty = float(np.square(weight).sum()) / (2 * INVERSE_PENALTY * len(features))
    sharpness = _best_sharpness(scores, numbers[sample], penalty)
    weight = sharpness * weight / scale
    return LinearClassifier(classes=classes, weight=weight, bias=sharpness * bias - weight @ mean)


def _best_sharpness(scores: Floats, numbers: npt.NDArray[np.intp], penalty: float) -> float:
    """Return the s in (0, 1] of least mean cross-entropy of s times the scores plus s² times the penalty.

    Args:
        scores: [n, K].
        numbers: The right column of each row, [n].
        penalty: At s = 1.
    """
    right = scores[np.arange(len(scores)), numbers]
    above = scores.max(1)

    def objective(sharpness: float) -> float:
        losses: Floats = np.log(np.exp(sharpness * (scores - above[:, None])).sum(1)) + sharpness * (above - right)
        return float(losses.mean()) + sharpness * sharpness * penalty

    return min((math.pow(2, -step / 2) for step in range(_SHARPNESSES)), key=objective)
