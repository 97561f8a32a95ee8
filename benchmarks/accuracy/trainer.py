"""From (task, configuration, seed) to a final model and its row: train or continue, choose on validation, test once."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.accuracy.configurations import CONFIGURATIONS, RECIPE, Configuration
from benchmarks.accuracy.prepare import read_summary
from benchmarks.accuracy.probe import fit_probe
from benchmarks.accuracy.table import ResultRow
from vpdeploy.errors import SpecError, TrainingError
from vpdeploy_train.backbone import Backbone, digest_tensors
from vpdeploy_train.batches import Batches
from vpdeploy_train.data import ImageDataset, resolve_data
from vpdeploy_train.device import choose_device
from vpdeploy_train.evaluation import evaluate
from vpdeploy_train.footprint import count_macs, shape_of
from vpdeploy_train.inputs import make_preprocessing
from vpdeploy_train.methods.method import NoPrompts
from vpdeploy_train.phases import FIRST_PHASE
from vpdeploy_train.place import ARGS_FILE
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.results import TrainingResult, Validation
from vpdeploy_train.run import CARD_FILE
from vpdeploy_train.settings import TrainSettings
from vpdeploy_train.training import train_run
from vpdeploy_train.workbench import STATE_FOLDER


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all rows of a table share.

    Attributes:
        keep: Shares of tokens that pruning tries, besides keeping all.
        trials: How many of a configuration's learning rates are tried.
        selection_seed: The seed they are tried with.
    """

    backbone: str
    weights: str | None
    image_size: int | None
    epochs: int
    batch_size: int
    keep: str
    precision: str
    trials: int
    selection_seed: int
    device: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Final:
    """A model that is final before the test split is opened."""

    model: PromptedViT
    rate: float
    chosen: str
    val_accuracy: float
    prompt_parameters: int


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Trains on one loaded backbone.

    Attributes:
        data: What ``prepare`` wrote.
        out: Folder of the run folders, ``TASK/CONFIGURATION/RATE/SEED``.
    """

    recipe: Setup
    backbone: Backbone
    data: Path
    out: Path

    def __post_init__(self) -> None:
        if shape_of(self.backbone.trunk, 1) is None:
            raise SpecError(f"{self.backbone.identity.name}: what a method costs is counted on plain ViTs; choose one")

    def finish(self, task: str, name: str, seed: int) -> ResultRow:
        """Bring one configuration to its end and test the model once.

        Raises:
            VpdeployError: The trainer refuses, or a method has changed the shared backbone.
        """
        started = time.perf_counter()
        with cpu_attention(choose_device(self.recipe.device)):
            final = self._fit_probe(task, seed) if name == "linear" else self._train(task, name, seed)
            self._check_backbone()
            seconds = time.perf_counter() - started
            test = evaluate(final.model, self._batches(task, seed, "test"))
            summary = read_summary(self.data, task)
            return ResultRow(
                task=task,
                configuration=name,
                seed=seed,
                rate=final.rate,
                chosen=final.chosen,
                val_accuracy=final.val_accuracy,
                test_accuracy=test.accuracy,
                train_images=summary["images"]["train"],
                val_images=summary["images"]["val"],
                test_images=test.images,
                prompt_parameters=final.prompt_parameters,
                head_parameters=sum(parameter.numel() for parameter in final.model.head.parameters()),
                backbone_parameters=sum(parameter.numel() for parameter in self.backbone.vit.parameters()),
                bytes=len(safetensors.torch.save(final.model.trained_state())),
                macs=count_macs(final.model),
                seconds=round(seconds, 1),
                data=summary["sha256"][:12],
            )

    def choose_rate(self, task: str, name: str) -> float:
        """Return the learning rate that is best on validation, for the selection seed; trains what is missing.

        A configuration that continues another one takes the rate of that one.
        """
        name = CONFIGURATIONS[name].continues or name
        rates = CONFIGURATIONS[name].rates[: self.recipe.trials]
        if len(rates) == 1:
            return rates[0]
        reached = {rate: validated(self._run(task, name, rate, self.recipe.selection_seed)) for rate in rates}
        return max(rates, key=lambda rate: (reached[rate].accuracy, -reached[rate].loss))

    def _train(self, task: str, name: str, seed: int) -> Final:
        rate = self.choose_rate(task, name)
        result = self._run(task, name, rate, seed)
        return Final(
            model=result.run.load_model(self.backbone).to(choose_device(self.recipe.device)),
            rate=rate,
            chosen=FIRST_PHASE if result.pruning is None else result.pruning.chosen,
            val_accuracy=validated(result).accuracy,
            prompt_parameters=result.prompts.parameters,
        )

    def _run(self, task: str, name: str, rate: float, seed: int) -> TrainingResult:
        """Return a finished run's result: as it lies there, continued, or new."""
        path = self._path(task, name, rate, seed)
        if (path / CARD_FILE).is_file():
            return TrainingResult.read(path)
        settings = self._settings(task, CONFIGURATIONS[name], seed, lr=rate)
        parent = CONFIGURATIONS[name].continues
        if parent is not None and not (path / ARGS_FILE).is_file():
            self._run(task, parent, rate, seed)
            continue_from(self._path(task, parent, rate, seed), path, settings)
        result = train_run(settings, path, resume=(path / ARGS_FILE).is_file(), name=task, backbone=self.backbone)
        self._check_backbone()
        return result

    def _fit_probe(self, task: str, seed: int) -> Final:
        model = PromptedViT(self.backbone.vit, NoPrompts(), len(self._source(task, seed).labels))
        model.to(choose_device(self.recipe.device))
        penalty, accuracy = fit_probe(model, self._batches(task, seed, "train"), self._batches(task, seed, "val"))
        return Final(model=model, rate=penalty, chosen=FIRST_PHASE, val_accuracy=accuracy, prompt_parameters=0)

    def _settings(self, task: str, configuration: Configuration, seed: int, **options: Any) -> TrainSettings:
        recipe = self.recipe
        return TrainSettings.merge(
            RECIPE,
            {
                "data": str((self.data / task).resolve()),
                "method": configuration.method,
                "backbone": recipe.backbone,
                "weights": recipe.weights,
                "image_size": recipe.image_size,
                "epochs": recipe.epochs,
                "batch_size": recipe.batch_size,
                "precision": recipe.precision,
                "device": recipe.device,
                "seed": seed,
                "prune": False,
                "keep": recipe.keep,
            },
            configuration.settings,
            options,
        )

    def _path(self, task: str, name: str, rate: float, seed: int) -> Path:
        return self.out / task / name / f"rate-{rate:g}" / f"seed-{seed}"

    def _source(self, task: str, seed: int) -> Any:
        return resolve_data(str(self.data / task), seed=seed)

    def _batches(self, task: str, seed: int, split: str) -> Batches:
        settings = self._settings(task, CONFIGURATIONS["linear"], seed)
        preprocessing = make_preprocessing(settings, self.backbone)
        return Batches(
            dataset=ImageDataset(self._source(task, seed).split(split), preprocessing),
            preprocessing=preprocessing,
            batch_size=64,
            device=choose_device(self.recipe.device),
        )

    def _check_backbone(self) -> None:
        """Refuse to go on with a backbone that a method has trained in place."""
        if digest_tensors(self.backbone.vit.state_dict()) != self.backbone.identity.sha256:
            raise TrainingError("the shared backbone has changed while training; later rows would be wrong")


def validated(result: TrainingResult) -> Validation:
    """Return a run's validation results.

    Raises:
        SpecError: It has none, so there is nothing to choose by.
    """
    if result.validation is None:
        raise SpecError(f"{result.run.path}: has no validation results to choose a rate by")
    return result.validation


def continue_from(parent: Path, path: Path, settings: TrainSettings) -> None:
    """Set up a run folder that begins where a finished run with the same first phase ends.

    Training with pruning begins with the very training that the run without pruning consists of. Its stored state is
    handed on, and the trainer resumes after it: the result has the bytes of a run with pruning made in one go, for the
    price of the retrainings alone.
    """
    state = path / STATE_FOLDER / f"{FIRST_PHASE}.safetensors"
    state.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(parent / STATE_FOLDER / state.name, state)
    (path / ARGS_FILE).write_text(settings.to_toml())


@contextmanager
def cpu_attention(device: torch.device) -> Iterator[None]:
    """On a CPU use the plain attention kernel: the fused one takes half of a training step in bfloat16."""
    if device.type != "cpu":
        yield
        return
    with sdpa_kernel([SDPBackend.MATH]):
        yield
