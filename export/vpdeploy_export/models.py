"""What an export starts from: trained models, from a run's folder or from memory, and the same compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vpdeploy.format.task import TaskCard, check_task_name
from vpdeploy_export.compilation import CompiledPrompts, compile_prompts
from vpdeploy_export.images import GateImages, gate_images, images_without_run
from vpdeploy_export.parity import Expectation
from vpdeploy_train.backbone import Backbone
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.run import Run


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A trained model to export; ``of_run``, ``of_runs`` and ``of_model`` make it.

    A run's model is loaded when it is needed: an export first refuses all that can be refused without it.

    Example:
        >>> model = vpdeploy_export.TrainedModel.of_run(flowers_run)
        >>> model.card.name, len(model.card.labels)
        ('flowers', 4)
        >>> again = vpdeploy_export.TrainedModel.of_model(model.load(), model.card)
        >>> again.origin
        "the model of task 'flowers'"

    Attributes:
        card: What is known of the task.
        origin: Where the model comes from, for messages: a run's folder.
        load: Returns the model, in eval mode.
        images: Returns the images that the parity gate compares on: those of a folder, or without one the model's own.
    """

    card: TaskCard
    origin: str
    load: Callable[[], PromptedViT]
    images: Callable[[Path | None], GateImages]

    @classmethod
    def of_model(
        cls, model: PromptedViT, card: TaskCard, *, images: npt.NDArray[np.uint8] | None = None
    ) -> TrainedModel:
        """Return a model that is in memory.

        Args:
            model: The model; an export leaves its weights as they are, and the model in eval mode.
            card: What is known of the task: its name, labels, backbone and preprocessing.
            images: What the parity gate compares on, uint8 [B, H, W, 3]; None takes synthetic ones.
        """

        def choose(folder: Path | None) -> GateImages:
            if folder is not None or images is None:
                return images_without_run(card.preprocessing, folder)
            return GateImages(pixels=images, source=f"{len(images)} images that were given")

        return cls(card=card, origin=f"the model of task '{card.name}'", load=model.eval, images=choose)

    @classmethod
    def of_run(cls, run: Run | Path, *, weights: Path | None = None) -> TrainedModel:
        """Return the model of a run.

        Args:
            run: The run, or its folder.
            weights: Where the backbone's weights file lies now; None takes the place noted in the run.

        Raises:
            BundleError: The folder is no finished run, or a file of it is damaged.
        """
        return cls.of_runs([run], weights=weights)[0]

    @classmethod
    def of_runs(cls, runs: Sequence[Run | Path], *, weights: Path | None = None) -> list[TrainedModel]:
        """Return the models of runs; those of one backbone share its weights in memory.

        Args:
            runs: The runs, or their folders.
            weights: Where the backbone's weights file lies now; None takes the places noted in the runs.

        Raises:
            BundleError: A folder is no finished run, or a file of it is damaged.
        """
        backbones: dict[object, Backbone] = {}

        def model_of(run: Run) -> TrainedModel:
            def load() -> PromptedViT:
                key = run.card.backbone, run.card.preprocessing.image_size, run.pooling != "model"
                if key not in backbones:
                    backbones[key] = run.load_backbone(weights=weights)
                return run.load_model(backbones[key])

            return cls(card=run.card, origin=str(run.path), load=load, images=lambda folder: gate_images(run, folder))

        return [model_of(run if isinstance(run, Run) else Run.read(run)) for run in runs]


@dataclass(frozen=True, kw_only=True)
class CompiledModel:
    """A trained model and what deployment needs of it.

    Attributes:
        model: The trained model.
        prompts: Its prompts, compiled.
        card: The task as artifacts carry it.
        expectation: What the trained model answers on the parity gate's images.
    """

    model: PromptedViT
    prompts: CompiledPrompts
    card: TaskCard
    expectation: Expectation

    @classmethod
    def of(cls, trained: TrainedModel, images: Path | None) -> CompiledModel:
        """Load a model, note what it answers, and compile it.

        Args:
            trained: The model.
            images: A folder of images for the parity gate; None takes the model's own.

        Raises:
            SpecError: The task's name, the backbone's weights or the images cannot be used.
            ExportError: The prompts cannot be compiled.
            BundleCorruptError: The run is damaged.
        """
        check_task_name(trained.card.name)
        model = trained.load()
        expectation = Expectation.of_model(model, trained.card, trained.images(images))
        return cls(
            model=model, prompts=compile_prompts(model), card=_published_card(trained.card), expectation=expectation
        )


def _published_card(card: TaskCard) -> TaskCard:
    """Return the card as artifacts carry it: no search report, and of the trainer's own paths only the last part."""
    stored = card.details.get("hyperparameters")
    settings = dict(stored) if isinstance(stored, Mapping) else {}
    for name in ("data", "weights"):
        if name in settings:
            settings[name] = Path(str(settings[name])).name
    return replace(card, details={**card.details, "hyperparameters": settings, "pruning": None})
