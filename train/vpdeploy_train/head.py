"""Where the classifier starts: near zero, or at the linear probe of the untrained prompts."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from vpdeploy.errors import TrainingError
from vpdeploy_train.discriminant import INVERSE_PENALTY, Floats, LinearClassifier, fit_discriminant
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.settings import ClassWeights

_ABSENT_BIAS = -10.0  # a probability of e^-10 at most, beside a logit of 0

# Of scikit-learn's regression: it holds several float64 arrays of images × classes and of images × features, and takes
# some hundred passes over them. Fixed, not a share of memory: the result must not depend on the machine.
_MOST_SCORES = 1 << 24
_MOST_FEATURES = 1 << 27


@torch.no_grad()
def fit_head(
    model: PromptedViT, batches: Iterable[tuple[Tensor, Tensor]], *, class_weights: ClassWeights = "none"
) -> None:
    """Set a model's head to a linear probe of its present features; nothing else is changed.

    The probe is logistic regression, or where images × classes or images × features are many (2^24, 2^27) linear
    discriminant analysis, which takes one pass and memory linear in both.

    Training prompts from a probed head ("linear probing, then fine-tuning", arXiv 2202.10054) needs far fewer steps
    than from an untrained one, and does not distort good features at first. A class without a training image starts
    at a zero weight and a low bias.

    Args:
        model: Its prompts may be trained or not; there may be none.
        batches: Training images: normalised [B, 3, H, W] and labels [B], of two classes at least.
        class_weights: How the images of each class count in the fit.

    Raises:
        TrainingError: A feature is not finite.
    """
    # Features of all training images, [images, D].
    model.eval()
    parts = [(model.features(pixels).float().cpu().numpy(), labels.cpu().numpy()) for pixels, labels in batches]
    features = np.concatenate([part[0] for part in parts])
    labels = np.concatenate([part[1] for part in parts])
    del parts
    if not np.isfinite(features).all():
        raise TrainingError(
            "the backbone gives features that are not finite; check its weights, or use --precision fp32"
        )

    # Classes without an image keep a zero weight and a bias that makes them improbable.
    found = _fit_classifier(features, labels, class_weights)
    present = torch.from_numpy(found.classes)
    model.head.weight.zero_()[present] = torch.from_numpy(found.weight).to(model.head.weight)
    model.head.bias.fill_(_ABSENT_BIAS)[present] = torch.from_numpy(found.bias).to(model.head.bias)


def is_regression(images: int, classes: int, width: int) -> bool:
    """Tell whether a probe of so many images, classes and features is logistic regression: beyond, it is too large."""
    return images * classes <= _MOST_SCORES and images * width <= _MOST_FEATURES


def _fit_classifier(
    features: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], class_weights: ClassWeights
) -> LinearClassifier:
    """Fit logistic regression, or where that is too large linear discriminant analysis."""
    if is_regression(len(features), len(np.unique(labels)), features.shape[1]):
        return _fit_regression(features.astype(np.float64), labels, class_weights)
    return fit_discriminant(features, labels, balanced=class_weights == "balanced")


def _fit_regression(features: Floats, labels: npt.NDArray[np.int64], class_weights: ClassWeights) -> LinearClassifier:
    """Fit logistic regression on standardised features in float64: it is convex but badly scaled."""
    scaler = StandardScaler().fit(features)
    classifier = LogisticRegression(
        C=INVERSE_PENALTY, max_iter=1000, class_weight=None if class_weights == "none" else class_weights
    ).fit(scaler.transform(features), labels)
    weight, bias = classifier.coef_, classifier.intercept_
    if len(weight) == 1:  # two classes share one row; split into a row for each, the softmax is the same
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight / scaler.scale_  # the scaling is folded back
    return LinearClassifier(classes=classifier.classes_, weight=weight, bias=bias - weight @ scaler.mean_)
