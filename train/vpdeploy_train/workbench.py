"""What every phase of one run shares: the models that are made on it, and their training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor

from vpdeploy_train.backbone import Backbone
from vpdeploy_train.batches import Batches
from vpdeploy_train.data import ImageDataset
from vpdeploy_train.device import make_fabric
from vpdeploy_train.inputs import TrainingInputs
from vpdeploy_train.loop import fit, load_stored
from vpdeploy_train.lr_range import find_rate
from vpdeploy_train.methods.method import PromptDimensions, PromptMethod
from vpdeploy_train.objective import Objective, class_weights
from vpdeploy_train.pace import Pace
from vpdeploy_train.progress import Progress
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.settings import AUTO_LR, TrainSettings
from vpdeploy_train.state import EpochRow, PhaseState, StateFolder

STATE_FOLDER = "state"

MakeProgress = Callable[[str, int, int], Progress]
"""Makes the display of a phase of so many images, of which some are done."""

Watch = Callable[[EpochRow], None]
"""Told of an epoch that is complete and stored."""


@dataclass(frozen=True, kw_only=True)
class Workbench:
    """What every phase of one run shares.

    Attributes:
        settings: What the run was asked to do.
        backbone: The frozen backbone, on its device.
        classes: Number of classes, C.
        train: Training images, varied where an augmentation is asked for.
        val: Validation images.
        scoring: Training images as they are.
        objective: What training steps minimise.
        fabric: What places models on the device and casts to the precision.
        states: Where the phases' states are stored.
        make_progress: Makes the progress display of each phase.
        watch: Is told of every trained epoch, also of those that were stored before a resume.
    """

    settings: TrainSettings
    backbone: Backbone
    classes: int
    train: Batches
    val: Batches
    scoring: Batches
    objective: Objective
    fabric: Fabric
    states: StateFolder
    make_progress: MakeProgress
    watch: Watch

    @classmethod
    def of(
        cls,
        settings: TrainSettings,
        inputs: TrainingInputs,
        *,
        out: Path,
        device: torch.device,
        make_progress: MakeProgress,
        watch: Watch,
    ) -> Workbench:
        """Set up a run's workbench and move the backbone to its device.

        Raises:
            SpecError: The device does not support the precision.
        """

        def batches(dataset: ImageDataset) -> Batches:
            return Batches(
                dataset=dataset,
                preprocessing=inputs.preprocessing,
                batch_size=settings.batch_size,
                device=device,
                workers=settings.workers,
            )

        inputs.backbone.vit.to(device)
        train = batches(inputs.train)
        labels = [example.label for example in inputs.source.train]
        weights = class_weights(settings.class_weights, labels, len(inputs.source.labels))
        return cls(
            settings=settings,
            backbone=inputs.backbone,
            classes=len(inputs.source.labels),
            train=train,
            val=batches(inputs.val),
            scoring=train if inputs.scoring is inputs.train else batches(inputs.scoring),
            objective=Objective(
                weights=None if weights is None else weights.to(device), smoothing=settings.label_smoothing
            ),
            fabric=make_fabric(settings.precision, device),
            states=StateFolder(out / STATE_FOLDER),
            make_progress=make_progress,
            watch=watch,
        )

    def new_method(self, seed: int) -> PromptMethod:
        """Return unpruned prompts at their initial values.

        Raises:
            SpecError: The method does not fit the backbone.
        """
        settings = self.settings
        generator = torch.Generator().manual_seed(seed)
        return settings.kind.create(PromptDimensions.of(self.backbone.trunk), settings.options, generator)

    def new_model(self, method: PromptMethod) -> PromptedViT:
        """Return a model of prompts, on the run's device, its head at the run's initial values."""
        torch.manual_seed(self.settings.seed)
        published = self.settings.pooling == "published"
        model = PromptedViT(self.backbone.vit, method, self.classes, pools_prompts=published)
        return model.to(self.train.device)

    def scoring_sample(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Return training images for importance scores; folders are sorted by class, so in random order."""
        return self.scoring.sample(self.settings.score_images, seed=self.settings.seed)

    def choose_pace(self, model: PromptedViT) -> Pace:
        """Return the rates of the run: those that its settings say, or that a range test on this model chooses.

        Args:
            model: At its initial values, which it keeps.

        Raises:
            TrainingError: The test finds no rate.
        """
        steps = len(self.train)
        if self.settings.lr != AUTO_LR:
            return self.settings.pace(steps_per_epoch=steps)
        found = find_rate(model, self.train, settings=self.settings, objective=self.objective, fabric=self.fabric)
        return self.settings.pace(steps_per_epoch=steps, lr=found.lr, reason=found.reason)

    def run_phase(self, phase: str, model: PromptedViT, pace: Pace, *, until: int) -> PhaseState:
        """Bring one phase to an epoch, from its stored state if there is one.

        Args:
            phase: The phase's name.
            model: Trained in place; ends with the best epoch's tensors where the phase is finished.
            pace: At what rates.
            until: The epoch to reach, counted from 1.

        Raises:
            TrainingError: The loss is not finite, or the stored state is damaged.
        """
        # Go on from where the phase stands; a finished one is only loaded.
        state = self.states.read(phase)
        for row in state.history:
            self.watch(row)
        if state.finished:
            load_stored(model, state.best, phase=phase)
            return state

        # Train it to the epoch; each epoch's state is stored.
        images = len(self.train.dataset)
        with self.make_progress(phase, images * until, images * len(state.history)) as progress:
            return fit(
                model,
                self.train,
                self.val,
                phase=phase,
                state=state,
                settings=self.settings,
                pace=pace,
                objective=self.objective,
                fabric=self.fabric,
                progress=progress,
                store=lambda state: self.states.write(phase, state),
                until=until,
                watch=self.watch,
            )
