"""The linear probe: the frozen features of a task computed once, and a penalty chosen on validation.

Nothing before the head is trained and no image is varied, so that the features are those of every epoch. The probe
has nothing random: with the splits fixed, its rows are equal for all seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor

from vpdeploy_train.batches import Batches
from vpdeploy_train.prompted import PromptedViT

INVERSE_PENALTIES = (0.001, 0.01, 0.1, 1.0)


@torch.no_grad()
def fit_probe(
    model: PromptedViT, train: Batches, val: Batches, penalties: Sequence[float] = INVERSE_PENALTIES
) -> tuple[float, float]:
    """Set the head of a model without prompts to the logistic regression that is best on validation.

    Args:
        model: Its head is set.
        train: Training images; every class occurs.
        val: Validation images.
        penalties: The inverse penalties to choose from.

    Returns:
        The chosen inverse penalty and the accuracy on validation.
    """
    inputs, labels = compute_features(model, train)
    val_inputs, val_labels = compute_features(model, val)
    scaler = StandardScaler().fit(inputs)
    fits = []
    # The matrices are small: more threads only wait for each other.
    with threadpool_limits(1):
        for penalty in penalties:
            classifier = LogisticRegression(C=penalty, max_iter=2000).fit(scaler.transform(inputs), labels)
            likelihoods = classifier.predict_proba(scaler.transform(val_inputs))
            accuracy = float((likelihoods.argmax(1) == val_labels).mean())
            loss = log_loss(val_labels, likelihoods, labels=classifier.classes_)
            fits.append((accuracy, -loss, penalty, classifier))
    accuracy, _, penalty, classifier = max(fits, key=lambda fit: fit[:2])
    weight, bias = classifier.coef_, classifier.intercept_
    if len(weight) == 1:  # two classes share one row; the softmax of these two is the same
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight / scaler.scale_
    model.head.weight.copy_(torch.from_numpy(weight))
    model.head.bias.copy_(torch.from_numpy(bias - weight @ scaler.mean_))
    return penalty, accuracy


def compute_features(model: PromptedViT, batches: Batches) -> tuple[np.ndarray, np.ndarray]:
    """Return pooled features [n, D], float64, and labels [n]."""
    model.eval()
    parts: list[tuple[Tensor, Tensor]] = [(model.features(pixels).double().cpu(), y.cpu()) for pixels, y in batches]
    return torch.cat([part[0] for part in parts]).numpy(), torch.cat([part[1] for part in parts]).numpy()
