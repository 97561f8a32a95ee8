"""How good a model is on labelled images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from vpdeploy.errors import SpecError
from vpdeploy.progress import ProgressBar
from vpdeploy_train.backbone import Backbone
from vpdeploy_train.batches import Batches
from vpdeploy_train.data import CacheBudget, ImageDataset, preload_images, resolve_data
from vpdeploy_train.device import choose_device
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.run import Run

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Results on one split. Only ``confusion`` takes memory that grows with the square of the number of classes.

    Attributes:
        loss: Mean cross-entropy.
        classes: Number of classes, C.
        labels: True class of each image, int64 [images], read-only.
        predicted: Top-1 class of each image, int64 [images], read-only.
    """

    loss: float
    classes: int
    labels: Numbers
    predicted: Numbers

    @property
    def images(self) -> int:
        """How many images were evaluated."""
        return len(self.labels)

    @property
    def accuracy(self) -> float:
        """Share of images whose top-1 class is right, in [0, 1]; 0 where there are no images."""
        return float((self.labels == self.predicted).sum()) / max(self.images, 1)

    @property
    def class_accuracy(self) -> float:
        """Mean over classes of each class's accuracy, in [0, 1].

        A class that is neither the label of an image nor predicted is left out; one that is only predicted counts as 0.
        """
        true, found, right = (
            np.bincount(chosen, minlength=self.classes)
            for chosen in (self.labels, self.predicted, self.labels[self.labels == self.predicted])
        )
        seen = true + found > 0
        return float((right[seen] / np.maximum(true[seen], 1)).sum()) / max(int(seen.sum()), 1)

    def confusion(self) -> Numbers:
        """Return the counts by true class and predicted class, int64 [C, C]."""
        cells = np.bincount(self.labels * self.classes + self.predicted, minlength=self.classes**2)
        return cells.reshape(self.classes, self.classes)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "images": self.images,
            "loss": self.loss,
            "accuracy": self.accuracy,
            "class_accuracy": self.class_accuracy,
            "confusion": self.confusion().tolist(),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class RunEvaluation:
    """How good a run is on one split of a data set.

    Attributes:
        run: The run.
        split: ``train``, ``val`` or ``test``.
        evaluation: The results; its class numbers index the run's labels.

    Example:
        >>> found = vpdeploy_train.evaluate_run(vpdeploy_train.Run.read(run))
        >>> found.evaluation.confusion().shape  # true class by predicted class
        (3, 3)
        >>> list(found.to_json())
        ['run', 'split', 'labels', 'images', 'loss', 'accuracy', 'class_accuracy', 'confusion']
    """

    run: Run
    split: str
    evaluation: Evaluation

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, as ``vpdeploy eval --json`` prints it."""
        about = {"run": str(self.run.path), "split": self.split, "labels": list(self.run.card.labels)}
        return about | self.evaluation.to_json()


@torch.no_grad()
def evaluate(model: PromptedViT, batches: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
    """Evaluate a model in eval mode.

    Args:
        model: On the device of the batches.
        batches: Normalised images [B, 3, H, W] and labels [B].
    """
    model.eval()
    loss, labels, predicted = 0.0, list[Tensor](), list[Tensor]()
    for pixels, true in batches:
        logits = model(pixels)
        loss += float(F.cross_entropy(logits, true, reduction="sum"))
        labels.append(true)
        predicted.append(logits.argmax(1))
    return Evaluation(
        loss=loss / max(sum(map(len, labels)), 1),
        classes=model.head.out_features,
        labels=_joined(labels),
        predicted=_joined(predicted),
    )


def evaluate_run(
    run: Run,
    *,
    data: str | None = None,
    split: str = "test",
    batch_size: int = 64,
    device: str = "auto",
    weights: Path | None = None,
    backbone: Backbone | None = None,
) -> RunEvaluation:
    """Evaluate a run on one split of a data set.

    Args:
        run: The run.
        data: A data specification; None takes the run's own.
        split: ``train``, ``val`` or ``test``.
        batch_size: Images in a batch.
        device: ``auto``, ``cpu`` or ``cuda``.
        weights: Where the backbone's weights file lies now; None takes the place noted in the run.
        backbone: The loaded backbone, where the caller evaluates several runs on it; moved to the device.

    Returns:
        What was evaluated, and how good it is.

    Raises:
        BundleCorruptError: The run's files are damaged.
        SpecError: The data, the split, the weights or the device cannot be used.
        InputError: An image cannot be decoded.

    Example:
        >>> found = vpdeploy_train.evaluate_run(vpdeploy_train.Run.read(run), split="test")
        >>> found.evaluation.images
        9
        >>> 0 <= found.evaluation.accuracy <= 1
        True
    """
    # The images, decoded once; the run's own labels number the classes.
    spec = data or run.data
    if spec is None:
        raise SpecError(f"{run.path}: was imported, so it names no data of its own; give --data")
    source = resolve_data(spec, seed=run.data_seed, val_fraction=run.val_fraction, labels=run.card.labels)
    dataset = ImageDataset(source.split(split), run.card.preprocessing, budget=CacheBudget.of_free_memory())
    with ProgressBar("reading images") as bar:
        preload_images([dataset], on_progress=lambda done, total: bar.show(done / total))

    # The model, on the device that computes.
    target = choose_device(device)
    model = run.load_model(backbone or run.load_backbone(weights=weights)).to(target)
    batches = Batches(
        dataset=dataset,
        preprocessing=run.card.preprocessing,
        batch_size=batch_size,
        device=target,
    )
    return RunEvaluation(run=run, split=split, evaluation=evaluate(model, batches))


def _joined(parts: list[Tensor]) -> Numbers:
    """Return tensors of class numbers as one read-only array."""
    joined = np.concatenate([np.zeros(0, np.int64), *(part.cpu().numpy() for part in parts)])
    joined.flags.writeable = False
    return joined
