"""What a run reads: its images and its frozen backbone, loaded once and perhaps shared by several runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vpdeploy.errors import InputError, SpecError
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy.progress import ProgressBar
from vpdeploy_train.backbone import Backbone, load_backbone
from vpdeploy_train.data import (
    Augmentation,
    CacheBudget,
    DataSource,
    ImageDataset,
    build_augmentation,
    preload_images,
    resolve_data,
)
from vpdeploy_train.data.copies import Copies, find_copies
from vpdeploy_train.data.dataset import prepared_bytes
from vpdeploy_train.data.preload import Damage, list_damaged, preload_sound_images, tell_damaged
from vpdeploy_train.data.summary import DataSummary
from vpdeploy_train.memory_plan import MemoryPlan, plan_training
from vpdeploy_train.recipes import recipe_remarks
from vpdeploy_train.settings import TrainSettings

logger = logging.getLogger("vpdeploy.train")

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True, kw_only=True)
class TrainingInputs:
    """Images and backbone of one task.

    Attributes:
        source: The examples of all splits.
        backbone: The frozen backbone.
        preprocessing: How images reach it.
        train: Training images, varied where an augmentation is asked for.
        val: Validation images.
        scoring: Training images as they are.
        copies: The images that are in the data more than once.
        skipped: What is wrong with the training and validation images that were left out, one text an image.
    """

    source: DataSource
    backbone: Backbone
    preprocessing: Preprocessing
    train: ImageDataset
    val: ImageDataset
    scoring: ImageDataset
    copies: Copies
    skipped: tuple[str, ...] = ()


def load_inputs(
    settings: TrainSettings, *, backbone: Backbone | None = None, cache_bytes: int | None = None
) -> TrainingInputs:
    """Load what a run reads; every training and validation image is decoded once.

    Args:
        settings: What the run is asked to do.
        backbone: The loaded backbone, where the caller has it; None loads it.
        cache_bytes: Memory that decoded images may take; None takes half of what the training leaves free.

    Raises:
        SpecError: Settings and data do not fit, the backbone cannot be had, or memory will not do.
        InputError: Images cannot be decoded; or where these are to be left out, a class or a split has no others.
    """
    # The examples, which have to suit what was asked for, and the backbone.
    source = resolve_data(settings.data, seed=settings.seed, val_fraction=settings.val_fraction)
    check_data(settings, source)
    summary = DataSummary.of(source)
    logger.info("%s", summary.to_text())
    for remark in summary.remarks(balanced=settings.class_weights == "balanced"):
        logger.warning("%s", remark)
    if backbone is None:
        backbone = load_backbone(
            settings.backbone,
            weights=None if settings.weights is None else Path(settings.weights),
            image_size=settings.image_size,
            averages=settings.pooling != "model",
        )

    # What it will take; then the images of all splits but test, decoded once: damaged ones are found before training.
    preprocessing = make_preprocessing(settings, backbone)
    augmentation = build_augmentation(settings.augment or source.augmentation, preprocessing)
    budget = CacheBudget(_plan_memory(settings, source, backbone, augmentation, cache_bytes).cache_bytes)
    train = ImageDataset(source.train, preprocessing, augmentation, settings.seed, budget=budget)
    val = ImageDataset(source.val, preprocessing, budget=budget)
    damaged: list[Damage] = []
    with ProgressBar("reading images") as bar:
        if settings.skip_corrupt:
            (train, val), damaged = preload_sound_images(
                [train, val], on_progress=lambda done, total: bar.show(done / total)
            )
        else:
            preload_images([train, val], on_progress=lambda done, total: bar.show(done / total))
    if damaged:
        source = _without(source, damaged)
        tell_damaged(damaged)
    with ProgressBar("comparing images") as bar:
        copies = find_copies(source, on_progress=lambda done, total: bar.show(done / total))
    for remark in copies.remarks():
        logger.warning("%s", remark)
    return TrainingInputs(
        source=source,
        backbone=backbone,
        preprocessing=preprocessing,
        train=train,
        val=val,
        scoring=train if augmentation is None else ImageDataset(source.train, preprocessing, budget=budget),
        copies=copies,
        skipped=tuple(each.reason for each in damaged),
    )


def _without(source: DataSource, damaged: Sequence[Damage]) -> DataSource:
    """Return the data without damaged images of ``train``, which is data set 0, and ``val``, which is 1.

    Raises:
        InputError: A class has no other training images, or there are no other validation images.
    """
    gone = {(each.dataset, each.index) for each in damaged}
    train, val = (
        tuple(example for index, example in enumerate(part) if (number, index) not in gone)
        for number, part in enumerate((source.train, source.val))
    )
    lost = sorted({example.label for example in source.train} - {example.label for example in train})
    if lost:
        others = f" (and of {len(lost) - 1} more classes)" if len(lost) > 1 else ""
        what = f"all training images of class '{source.labels[lost[0]]}'{others}"
    elif source.val and not val:
        what = "all validation images"
    else:
        return replace(source, train=train, val=val)
    raise InputError(f"{source.spec}: {what} are damaged: replace them, or remove the class: {list_damaged(damaged)}")


def check_data(settings: TrainSettings, data: DataSource) -> None:
    """Check that what was asked for can be done with the data, and warn where a recipe is for other data.

    Raises:
        SpecError: Something is to be chosen on validation images and there are none.
    """
    if settings.recipe is not None:
        for remark in recipe_remarks(settings.recipe, classes=len(data.labels), lr_is_given=settings.lr is not None):
            logger.warning("%s", remark)
    if data.val:
        return
    for asked, option in ((settings.prunes, "--no-prune"), (settings.early_stop > 0, "--early-stop 0")):
        if asked:
            raise SpecError(f"{data.spec}: no validation images to choose by; use {option}, or leave #final away")
    logger.info("%s: no validation images, the last epoch is the result", data.spec)


def make_preprocessing(settings: TrainSettings, backbone: Backbone) -> Preprocessing:
    """Return how images reach the backbone under the given settings."""
    mean, std = (backbone.mean, backbone.std) if settings.normalisation == "backbone" else _IMAGENET
    crop_ratio = 1.0 if settings.resize == "squash" else settings.crop_ratio or backbone.crop_ratio
    return Preprocessing(
        image_size=backbone.image_size, mean=mean, std=std, resize=settings.resize, crop_ratio=crop_ratio
    )


def _plan_memory(
    settings: TrainSettings,
    source: DataSource,
    backbone: Backbone,
    augmentation: Augmentation | None,
    cache_bytes: int | None,
) -> MemoryPlan:
    """Say what the training will take, and refuse what clearly does not fit."""
    preprocessing = make_preprocessing(settings, backbone)
    varied, plain = prepared_bytes(preprocessing, augmentation), prepared_bytes(preprocessing, None)
    decoded_bytes = len(source.train) * varied + len(source.val) * plain
    if augmentation is not None and (settings.head == "probe" or settings.prunes):
        decoded_bytes += len(source.train) * plain
    plan = plan_training(settings, source, backbone, decoded_bytes=decoded_bytes, cache_bytes=cache_bytes)
    plan.require_room()
    logger.info("%s", plan.describe())
    return plan
