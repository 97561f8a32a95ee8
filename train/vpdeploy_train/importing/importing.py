"""From a checkpoint of the public code to a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from vpdeploy.errors import SpecError
from vpdeploy.files import creating_folder, sha256_of_file
from vpdeploy.format.task import TaskCard, check_task_name
from vpdeploy_train.backbone import Backbone
from vpdeploy_train.footprint import paper_parameters
from vpdeploy_train.importing import require_format
from vpdeploy_train.importing.backbone import WEIGHTS_FILE, BackboneChoice, keep_backbone, named_backbone
from vpdeploy_train.importing.checkpoint import Checkpoint
from vpdeploy_train.importing.names import EMBEDDINGS, HEAD
from vpdeploy_train.importing.pipeline import Pipeline
from vpdeploy_train.importing.reference import ImportedPrompts
from vpdeploy_train.importing.vit import holds_vit
from vpdeploy_train.methods.method import PromptDimensions
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.results import ImportResult, PromptCounts
from vpdeploy_train.run import Run

logger = logging.getLogger("vpdeploy.import")


def import_checkpoint(
    path: Path,
    out: Path,
    *,
    format: str,
    name: str,
    backbone: BackboneChoice | None = None,
    pipeline: Pipeline | None = None,
    labels: Sequence[str] | None = None,
) -> ImportResult:
    """Write a run that computes what a checkpoint of the public VPT, E²VPT or VAPT code computes.

    Args:
        path: The torch file.
        out: The run folder; it appears only if everything fits.
        format: The name of the public code's format, one of ``FORMATS``.
        name: The task's name.
        backbone: What is known of the backbone besides the file; None where nothing is.
        pipeline: How images are prepared; None prepares them as the public code does.
        labels: Class names in index order; None takes "0", "1", and so on.

    Returns:
        The run as it was written, and how large its prompts are.

    Raises:
        SpecError: The file cannot be read, is not of that format, misses a tensor, or options do not fit it.
        OSError: The folder cannot be written.

    Example:
        >>> heads = vpdeploy_train.BackboneChoice(heads=3)
        >>> result = vpdeploy_train.import_checkpoint(
        ...     checkpoint, Path("runs/imported"), format="vpt", name="imported", backbone=heads
        ... )
        >>> result.run.card.method
        'vpt-deep'
    """
    # Refuse names, folders and formats before anything is written.
    check_task_name(name)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise SpecError(f"{out}: exists and is not empty; give another --out")
    backbone = backbone or BackboneChoice()
    pipeline = pipeline or Pipeline()
    checkpoint = Checkpoint.read(path)
    reference = require_format(checkpoint, format)
    with creating_folder(out) as folder:
        # The backbone: the checkpoint's own is kept beside the run, another is named.
        if holds_vit(checkpoint):
            width = checkpoint.take(f"{EMBEDDINGS}.cls_token", 1, 1, "D").shape[2]
            stored_heads = reference.heads(checkpoint, width)
            frozen = keep_backbone(checkpoint, backbone, folder, stored_heads=stored_heads)
            weights: str | None = WEIGHTS_FILE
        else:
            frozen = named_backbone(checkpoint, backbone)
            weights = None if backbone.weights is None else str(backbone.weights.resolve())

        # Prompts and head; every tensor of the checkpoint has to be accounted for.
        prompts = reference.read(checkpoint, PromptDimensions.of(frozen.trunk))
        model = _build_model(checkpoint, frozen, prompts)
        checkpoint.require_all_taken()

        # The run.
        counts = PromptCounts(parameters=paper_parameters(prompts.module), summary=prompts.module.summary())
        card = TaskCard(
            name=name,
            labels=_labels(checkpoint, model.head.out_features, labels),
            method=prompts.method,
            backbone=frozen.identity,
            preprocessing=pipeline.preprocessing(frozen.image_size),
            details={
                "imported": {"file": path.name, "format": format, "sha256": sha256_of_file(path)},
                "prompts": counts.to_json(),
                "pruning": None,
            },
        )
        run = Run(
            path=folder,
            card=card,
            structure=prompts.module.structure(),
            state=model.trained_state(),
            data=None,
            data_seed=0,
            val_fraction=0.2,
            weights=weights,
        )
        run.write()
    return ImportResult(run=replace(run, path=out), prompts=counts)


def _build_model(checkpoint: Checkpoint, frozen: Backbone, prompts: ImportedPrompts) -> PromptedViT:
    """Return the prompted model with the checkpoint's linear head."""
    weight = checkpoint.take(f"{HEAD}.weight", "C", frozen.identity.width)
    bias = checkpoint.take(f"{HEAD}.bias", len(weight))
    model = PromptedViT(frozen.vit, prompts.module, len(weight))
    with torch.no_grad():
        model.head.weight.copy_(weight)
        model.head.bias.copy_(bias)
    return model.eval()


def _labels(checkpoint: Checkpoint, classes: int, given: Sequence[str] | None) -> tuple[str, ...]:
    if given is None:
        logger.info(
            'note: a checkpoint holds no class names, so they are "0" to "%d"; --labels gives them', classes - 1
        )
        return tuple(str(index) for index in range(classes))
    if len(given) != classes:
        raise SpecError(
            f"--labels: {len(given)} class names, but '{HEAD}.weight' of {checkpoint.source} has {classes} classes"
        )
    return tuple(given)
