"""What training minimises: cross-entropy, with the class weights and the label smoothing that were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vpdeploy_train.settings import ClassWeights


@dataclass(frozen=True, kw_only=True, eq=False)
class Objective:
    """The loss of training steps; validation and evaluation keep to plain cross-entropy.

    Attributes:
        weights: Of each class, float32 [C], on the device of the logits; None weighs all images alike.
        smoothing: Share of the target that is spread evenly over all classes, in [0, 1)
            (Rethinking the Inception Architecture, arXiv 1512.00567, section 7).
    """

    weights: Tensor | None = None
    smoothing: float = 0.0

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a batch, a scalar: the mean over its images, by the weights of their classes.

        Torch's own weights would weigh the smoothed share of every class, too: a rare class would then draw all other
        images towards itself.

        Args:
            logits: [B, C].
            labels: [B].
        """
        if self.weights is None:
            return F.cross_entropy(logits.float(), labels, label_smoothing=self.smoothing)
        losses = F.cross_entropy(logits.float(), labels, label_smoothing=self.smoothing, reduction="none")
        weights = self.weights[labels]
        return (weights * losses).sum() / weights.sum()


def class_weights(kind: ClassWeights, labels: Sequence[int], classes: int) -> Tensor | None:
    """Return the weight of each class, float32 [C], or None where all are alike.

    ``balanced`` is scikit-learn's: n / (C n_c) for the n_c of n images that are of class c, of C classes with images;
    a class without an image has no weight.

    Args:
        kind: What was asked for.
        labels: Classes of the training images.
        classes: Number of classes.
    """
    if kind == "none":
        return None
    counts = np.bincount(np.asarray(labels, dtype=np.int64), minlength=classes)
    present = counts > 0
    weights = np.where(present, len(labels) / (present.sum() * np.maximum(counts, 1)), 0.0)
    return torch.from_numpy(weights.astype(np.float32))
