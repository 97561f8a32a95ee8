"""How good a model is on labelled images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from vpdeploy.errors import SpecError
from vpdeploy_train.batches import Batches
from vpdeploy_train.data import CacheBudget, ImageDataset, preload_images, resolve_data
from vpdeploy_train.device import choose_device
from vpdeploy_train.progress import reading_bar
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.run import Run


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Results on one split.

    Attributes:
        images: How many images.
        loss: Mean cross-entropy.
        accuracy: Share of images whose top-1 class is right, in [0, 1].
        class_accuracy: Mean over classes of each class's accuracy.
        confusion: Counts [true class][predicted class].
    """

    images: int
    loss: float
    accuracy: float
    class_accuracy: float
    confusion: tuple[tuple[int, ...], ...]

    def to_fields(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "images": self.images,
            "loss": self.loss,
            "accuracy": self.accuracy,
            "class_accuracy": self.class_accuracy,
            "confusion": [list(row) for row in self.confusion],
        }


@torch.no_grad()
def evaluate(model: PromptedViT, batches: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
    """Evaluate a model in eval mode.

    Args:
        model: On the device of the batches.
        batches: Normalised images [B, 3, H, W] and labels [B].
    """
    model.eval()
    classes = model.head.out_features
    device = model.head.weight.device
    accuracy = MulticlassAccuracy(num_classes=classes, average="micro").to(device)
    by_class = MulticlassAccuracy(num_classes=classes, average="macro").to(device)
    confusion = MulticlassConfusionMatrix(num_classes=classes).to(device)
    loss, images = 0.0, 0
    for pixels, labels in batches:
        logits = model(pixels)
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        images += len(labels)
        for metric in (accuracy, by_class, confusion):
            metric.update(logits, labels)
    counts = confusion.compute().int().tolist()
    return Evaluation(
        images=images,
        loss=loss / max(images, 1),
        accuracy=float(accuracy.compute()),
        class_accuracy=float(by_class.compute()),
        confusion=tuple(tuple(row) for row in counts),
    )


def evaluate_run(
    path: Path,
    data: str | None,
    *,
    split: str,
    batch_size: int = 64,
    device: str = "auto",
    weights: Path | None = None,
) -> tuple[Evaluation, list[str]]:
    """Evaluate a run folder on one split of a data set.

    Args:
        path: The run folder.
        data: A data specification; None takes the run's own.
        split: ``train``, ``val`` or ``test``.
        batch_size: Images in a batch.
        device: ``auto``, ``cpu`` or ``cuda``.
        weights: Where the backbone's weights file lies now.

    Returns:
        The results and the class names.

    Raises:
        BundleError: The folder is no finished run, or is damaged.
        SpecError: The data, the split or the device cannot be used.
        InputError: An image cannot be decoded.
    """
    run = Run.read(path)
    labels = run.card.labels
    spec = data or run.data
    if spec is None:
        raise SpecError(f"{path}: was imported, so it names no data of its own; give --data")
    source = resolve_data(spec, seed=run.data_seed, val_fraction=run.val_fraction, labels=labels)
    dataset = ImageDataset(source.split(split), run.card.preprocessing, budget=CacheBudget.of_free_memory())
    with reading_bar() as on_progress:
        preload_images([dataset], on_progress=on_progress)
    target = choose_device(device)
    model = run.load_model(run.load_backbone(weights=weights)).to(target)
    batches = Batches(
        dataset=dataset,
        preprocessing=run.card.preprocessing,
        batch_size=batch_size,
        device=target,
    )
    return evaluate(model, batches), list(labels)
