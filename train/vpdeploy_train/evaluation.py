"""How good a model is on labelled images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from vpdeploy.errors import InputError
from vpdeploy.progress import ProgressBar
from vpdeploy.text import cut_name
from vpdeploy_train.backbone import Backbone
from vpdeploy_train.batches import Batches
from vpdeploy_train.data import CacheBudget, ImageDataset, preload_images
from vpdeploy_train.data.preload import Damage, list_damaged, preload_sound_images, tell_damaged
from vpdeploy_train.device import choose_device
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.run import Run

Numbers = npt.NDArray[np.int64]

MOST_DENSE_CLASSES: Final = 1_000
"""Up to so many classes the JSON form has the whole confusion matrix; it grows with their square."""

MOST_CONFUSED: Final = 1_000
"""So many confused pairs of classes the JSON form lists."""

_TOLD = 5  # classes, and pairs of classes, that are told in words


@dataclass(frozen=True, kw_only=True)
class Confused:
    """Images of one class that were taken for another.

    Attributes:
        true: Their class.
        predicted: What they were taken for.
        images: How many they are.
    """

    true: int
    predicted: int
    images: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Results on one split. Only ``confusion`` takes memory that grows with the square of the number of classes.

    The arrays that it returns are read-only or the caller's own.

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
        true = self.class_images
        seen = true + np.bincount(self.predicted, minlength=self.classes) > 0
        return float((self.class_right[seen] / np.maximum(true[seen], 1)).sum()) / max(int(seen.sum()), 1)

    @property
    def class_images(self) -> Numbers:
        """How many images each class has, int64 [C]."""
        return np.bincount(self.labels, minlength=self.classes)

    @property
    def class_right(self) -> Numbers:
        """How many images of each class are predicted as it, int64 [C]."""
        return np.bincount(self.labels[self.labels == self.predicted], minlength=self.classes)

    def worst_classes(self) -> Numbers:
        """Return the classes that have images, the least accurate first, of equals the one of more images."""
        images, right = self.class_images, self.class_right
        present = np.flatnonzero(images)
        return present[np.lexsort((present, -images[present], right[present] / images[present]))]

    def confused(self, most: int) -> list[Confused]:
        """Return the pairs of classes that were confused, the most frequent first.

        Args:
            most: How many pairs at most.
        """
        wrong = self.labels != self.predicted
        cells, counts = np.unique(self.labels[wrong] * self.classes + self.predicted[wrong], return_counts=True)
        order = np.lexsort((cells, -counts))[:most]
        return [
            Confused(true=int(cell) // self.classes, predicted=int(cell) % self.classes, images=int(count))
            for cell, count in zip(cells[order], counts[order], strict=True)
        ]

    def confusion(self) -> Numbers:
        """Return the counts by true class and predicted class, int64 [C, C]."""
        cells = np.bincount(self.labels * self.classes + self.predicted, minlength=self.classes**2)
        return cells.reshape(self.classes, self.classes)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; beyond ``MOST_DENSE_CLASSES`` classes ``confusion`` is null."""
        return {
            "images": self.images,
            "loss": self.loss,
            "accuracy": self.accuracy,
            "class_accuracy": self.class_accuracy,
            "confusion": self.confusion().tolist() if self.classes <= MOST_DENSE_CLASSES else None,
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class RunEvaluation:
    """How good a run is on one split of a data set.

    Attributes:
        run: The run.
        split: ``train``, ``val`` or ``test``.
        evaluation: The results; its class numbers index the run's labels.
        skipped: Number of damaged images that were left out.

    Example:
        >>> found = vpdeploy_train.evaluate_run(vpdeploy_train.Run.read(run))
        >>> found.evaluation.confusion().shape  # true class by predicted class
        (3, 3)
        >>> list(found.to_json())
        ['run', 'split', 'labels', 'skipped', 'images', 'loss', 'accuracy', 'class_accuracy', 'confusion',
         'per_class', 'confused']
    """

    run: Run
    split: str
    evaluation: Evaluation
    skipped: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, as ``vpdeploy eval --json`` prints it.

        An accuracy is null where a class has no images; at most ``MOST_CONFUSED`` pairs are listed.
        """
        labels, found = self.run.card.labels, self.evaluation
        about = {
            "run": str(self.run.path),
            "split": self.split,
            "labels": list(labels),
            "skipped": self.skipped,
        }
        classes = zip(labels, found.class_images.tolist(), found.class_right.tolist(), strict=True)
        return {
            **about,
            **found.to_json(),
            "per_class": [
                {"label": label, "images": images, "accuracy": right / images if images else None}
                for label, images, right in classes
            ],
            "confused": [
                {"true": labels[pair.true], "predicted": labels[pair.predicted], "images": pair.images}
                for pair in found.confused(MOST_CONFUSED)
            ],
        }

    def to_text(self) -> str:
        """Return the lines that ``vpdeploy eval`` prints: the figures, the worst classes and the most confused ones."""
        labels, found = self.run.card.labels, self.evaluation
        images, right = found.class_images, found.class_right
        worst = [each for each in found.worst_classes()[:_TOLD] if right[each] < images[each]]
        skipped = f", {self.skipped} damaged ones left out" if self.skipped else ""
        lines = [
            f"{self.run.path}: {found.images} images of split '{self.split}'{skipped}",
            f"accuracy {found.accuracy:.4f}, mean over classes {found.class_accuracy:.4f}, loss {found.loss:.4f}",
        ]
        if worst:
            lines.append("worst classes:")
            lines += [f"  {right[each]} of {images[each]} right  {cut_name(labels[each])}" for each in worst]
        if pairs := found.confused(_TOLD):
            lines.append("most confused:")
            lines += [
                f"  {pair.images} of {images[pair.true]}  {cut_name(labels[pair.true])} -> "
                f"{cut_name(labels[pair.predicted])}"
                for pair in pairs
            ]
        return "\n".join(lines)


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
    cache_bytes: int | None = None,
    skip_corrupt: bool = False,
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
        cache_bytes: Memory that decoded images may take; None takes half of what is free.
        skip_corrupt: Leave out images that cannot be decoded, instead of refusing them.

    Returns:
        What was evaluated, and how good it is.

    Raises:
        BundleCorruptError: The run's files are damaged.
        SpecError: The data, the split, the weights or the device cannot be used.
        InputError: An image cannot be decoded; or where these are to be left out, all of them.

    Example:
        >>> found = vpdeploy_train.evaluate_run(vpdeploy_train.Run.read(run), split="test")
        >>> found.evaluation.images
        9
        >>> 0 <= found.evaluation.accuracy <= 1
        True
    """
    # The examples, numbered by the run's own labels, and the model: what cannot work is refused before images are read.
    source = run.read_data(data)
    examples = source.split(split)
    target = choose_device(device)
    model = run.load_model(backbone or run.load_backbone(weights=weights)).to(target)

    # The images, decoded once where they fit into memory, so that damaged ones are all named.
    dataset = ImageDataset(examples, run.card.preprocessing, budget=CacheBudget.of(cache_bytes))
    damaged: list[Damage] = []
    with ProgressBar("reading images") as bar:
        if skip_corrupt:
            (dataset,), damaged = preload_sound_images(
                [dataset], on_progress=lambda done, total: bar.show(done / total)
            )
        else:
            preload_images([dataset], on_progress=lambda done, total: bar.show(done / total))
    if damaged and not len(dataset):
        raise InputError(f"{source.spec}: all {len(damaged)} images are damaged: {list_damaged(damaged)}")
    tell_damaged(damaged)
    batches = Batches(dataset=dataset, preprocessing=run.card.preprocessing, batch_size=batch_size, device=target)
    return RunEvaluation(run=run, split=split, evaluation=evaluate(model, batches), skipped=len(damaged))


def _joined(parts: list[Tensor]) -> Numbers:
    """Return tensors of class numbers as one read-only array."""
    joined = np.concatenate([np.zeros(0, np.int64), *(part.cpu().numpy() for part in parts)])
    joined.flags.writeable = False
    return joined
