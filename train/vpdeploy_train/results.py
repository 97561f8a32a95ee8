"""What a run came to, in types: what code reads, where a card's details are for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vpdeploy.format.document import Document
from vpdeploy.format.run import CARD_FILE
from vpdeploy_train.footprint import paper_parameters, prompt_bytes, tuned_percent
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.pruning.report import PruningReport
from vpdeploy_train.run import Run


@dataclass(frozen=True, kw_only=True)
class Validation:
    """How good the chosen epoch is on the validation images.

    Attributes:
        accuracy: Share of images whose top-1 class is right, in [0, 1].
        loss: Mean cross-entropy.
    """

    accuracy: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class ChosenEpoch:
    """Which epoch of which phase the result is, and what it had to beat.

    Attributes:
        phase: ``train``, or the phase of the pruning search whose prompt set was chosen.
        epoch: Counted from 1; 0 is the phase's start, before the first step.
        epochs: How many epochs the phase was trained.
        lr: Learning rate of the run, for batches of 256 images.
        lr_reason: Why ``--lr auto`` chose it; None where it did not choose.
        start: Validation results of the phase's start; None where nothing was validated.
        first_start: Those of the first phase's start, which the whole training has to beat.
    """

    phase: str
    epoch: int
    epochs: int
    lr: float
    lr_reason: str | None
    start: Validation | None
    first_start: Validation | None

    @classmethod
    def from_document(cls, document: Document) -> ChosenEpoch:
        """Read the JSON form.

        Raises:
            BundleCorruptError: A field is missing or of another type.
        """
        return cls(
            phase=document.take("phase", str),
            epoch=document.take("epoch", int),
            epochs=document.take("epochs", int),
            lr=document.take("lr", float),
            lr_reason=None if document.fields.get("lr_reason") is None else document.take("lr_reason", str),
            start=validation_from(document.nested("start")),
            first_start=validation_from(document.nested("first_start")),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; its keys are the attributes' names."""
        starts = {"start": metrics_to_json(self.start), "first_start": metrics_to_json(self.first_start)}
        return vars(self) | starts


@dataclass(frozen=True, kw_only=True)
class PromptCounts:
    """How large a prompt set is.

    Attributes:
        parameters: The paper's count: trained numbers, less those of pruned segments.
        tuned_percent: Prompts and head as a share of backbone and head, in percent; None for an imported run.
        size_bytes: Bytes of the stored prompt tensors, without the head; None for an imported run.
        summary: What the method itself reports of its prompts, for people.
    """

    parameters: int
    tuned_percent: float | None = None
    size_bytes: int | None = None
    summary: Mapping[str, Any]

    @classmethod
    def of(cls, model: PromptedViT, vit: nn.Module) -> PromptCounts:
        """Count a trained model's prompts.

        Args:
            model: The model.
            vit: Its backbone as it was before the method; the model's own may have further weights.
        """
        return cls(
            parameters=paper_parameters(model.method),
            tuned_percent=tuned_percent(model, vit),
            size_bytes=prompt_bytes(model),
            summary=model.method.summary(),
        )

    @classmethod
    def from_document(cls, document: Document) -> PromptCounts:
        """Read the JSON form.

        Raises:
            BundleCorruptError: A field is missing or of another type.
        """
        fields = document.fields
        return cls(
            parameters=document.take("parameters", int),
            tuned_percent=document.take("tuned_percent", float) if "tuned_percent" in fields else None,
            size_bytes=document.take("bytes", int) if "bytes" in fields else None,
            summary={name: value for name, value in fields.items() if name not in ("tuned_percent", "bytes")},
        )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form: the method's summary, then what was counted beside it."""
        counted = {"tuned_percent": self.tuned_percent, "bytes": self.size_bytes}
        return {**self.summary, **{name: value for name, value in counted.items() if value is not None}}


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a training came to.

    Attributes:
        run: The run, as it lies on disk.
        validation: Results of the chosen epoch; None where there are no validation images.
        chosen: Which epoch that is, and where it started; None for a run of an earlier version, which did not say.
        prompts: How large the prompt set is.
        pruning: What the pruning search did; None where nothing was pruned.

    Example:
        >>> result = vpdeploy_train.TrainingResult.read(run)
        >>> 0 <= result.validation.accuracy <= 1
        True
        >>> list(result.to_json())
        ['run', 'task', 'metrics', 'chosen', 'prompts']
    """

    run: Run
    validation: Validation | None
    chosen: ChosenEpoch | None
    prompts: PromptCounts
    pruning: PruningReport | None

    @classmethod
    def read(cls, path: Path) -> TrainingResult:
        """Return what a finished training came to.

        Args:
            path: The run folder.

        Raises:
            BundleError: The folder is no finished run.
            BundleCorruptError: A file is damaged, or the run was imported and not trained.
            BundleVersionError: It was written in another format version.
        """
        run = Run.read(path)
        details = Document(f"{path / CARD_FILE}: details", run.card.details)
        return cls(
            run=run,
            validation=validation_from(details.nested("metrics")),
            chosen=None
            if details.fields.get("chosen") is None
            else ChosenEpoch.from_document(details.nested("chosen")),
            prompts=PromptCounts.from_document(details.nested("prompts")),
            pruning=None
            if details.fields.get("pruning") is None
            else PruningReport.from_document(details.nested("pruning")),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, as ``vpdeploy train --json`` prints it."""
        return {
            "run": str(self.run.path),
            "task": self.run.card.name,
            "metrics": metrics_to_json(self.validation),
            "chosen": None if self.chosen is None else self.chosen.to_json(),
            "prompts": self.prompts.to_json(),
        }


@dataclass(frozen=True, kw_only=True)
class ImportResult:
    """What an import came to.

    Attributes:
        run: The run, as it lies on disk.
        prompts: How large the prompt set is.

    Example:
        >>> heads = vpdeploy_train.BackboneChoice(heads=3)
        >>> result = vpdeploy_train.import_checkpoint(
        ...     checkpoint, Path("runs/other"), format="vpt", name="other", backbone=heads
        ... )
        >>> result.prompts.parameters == result.to_json()["prompts"]["parameters"]
        True
    """

    run: Run
    prompts: PromptCounts

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, as ``vpdeploy import --json`` prints it."""
        card = self.run.card
        return {
            "run": str(self.run.path),
            "task": card.name,
            "method": card.method,
            "classes": len(card.labels),
            "backbone": card.backbone.to_fields(),
            "preprocessing": card.preprocessing.to_fields(),
            "prompts": self.prompts.to_json(),
            "weights": self.run.weights,
        }


def metrics_to_json(validation: Validation | None) -> dict[str, float | None]:
    """Return the JSON form of validation results; null where nothing was validated."""
    if validation is None:
        return {"val_accuracy": None, "val_loss": None}
    return {"val_accuracy": validation.accuracy, "val_loss": validation.loss}


def validation_from(document: Document) -> Validation | None:
    """Read the JSON form of validation results; None where nothing was validated.

    Raises:
        BundleCorruptError: A field is missing or of another type.
    """
    if document.fields.get("val_accuracy") is None:
        return None
    return Validation(accuracy=document.take("val_accuracy", float), loss=document.take("val_loss", float))
