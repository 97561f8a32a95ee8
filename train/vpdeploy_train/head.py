"""Where the classifier starts: near zero, or at the linear probe of the untrained prompts."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from vpdeploy.errors import TrainingError
from vpdeploy_train.prompted import PromptedViT

_INVERSE_PENALTY = 0.1
_ABSENT_BIAS = -10.0  # a probability of e^-10 at most, beside a logit of 0


@torch.no_grad()
def fit_head(model: PromptedViT, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Set a model's head to logistic regression on its present features; nothing else is changed.

    Training prompts from a probed head ("linear probing, then fine-tuning", arXiv 2202.10054) needs far fewer steps
    than from an untrained one, and does not distort good features at first. A class without a training image starts
    at a zero weight and a low bias.

    Args:
        model: Its prompts may be trained or not; there may be none.
        batches: Training images: normalised [B, 3, H, W] and labels [B], of two classes at least.

    Raises:
        TrainingError: A feature is not finite.
    """
    # Features of all training images, [images, D], in float64: the fit is convex but badly scaled.
    model.eval()
    parts = [(model.features(pixels).float().cpu().numpy(), labels.cpu().numpy()) for pixels, labels in batches]
    features = np.concatenate([part[0] for part in parts]).astype(np.float64)
    labels = np.concatenate([part[1] for part in parts])
    if not np.isfinite(features).all():
        raise TrainingError(
            "the backbone gives features that are not finite; check its weights, or use --precision fp32"
        )

    # Logistic regression on standardised features; the scaling is folded back into weight and bias.
    scaler = StandardScaler().fit(features)
    classifier = LogisticRegression(C=_INVERSE_PENALTY, max_iter=1000).fit(scaler.transform(features), labels)
    weight, bias = classifier.coef_, classifier.intercept_
    if len(weight) == 1:  # two classes share one row; split into a row for each, the softmax is the same
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight / scaler.scale_
    bias = bias - weight @ scaler.mean_

    # Classes without an image keep a zero weight and a bias that makes them improbable.
    present = torch.from_numpy(classifier.classes_)
    model.head.weight.zero_()[present] = torch.from_numpy(weight).to(model.head.weight)
    model.head.bias.fill_(_ABSENT_BIAS)[present] = torch.from_numpy(bias).to(model.head.bias)
