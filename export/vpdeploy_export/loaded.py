"""A run, loaded and compiled: what both kinds of export start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch

from vpdeploy.graphfacts import Precision
from vpdeploy.task import TaskCard, check_task_name
from vpdeploy_export.compilation import CompiledPrompts, compile_prompts
from vpdeploy_export.images import gate_images
from vpdeploy_export.parity import Expectation, expected_logits
from vpdeploy_train.backbone import Backbone
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.run import Run

DEFAULT_OPSET: Final = 20
TORCH_DTYPES: Final[dict[Precision, torch.dtype]] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A trained model and what deployment needs of it.

    Attributes:
        run: The run.
        model: The trained model.
        prompts: Its prompts, compiled.
        card: The task as artifacts carry it.
        expectation: What the trained model answers on the parity gate's images.
    """

    run: Run
    model: PromptedViT
    prompts: CompiledPrompts
    card: TaskCard
    expectation: Expectation

    @classmethod
    def load(cls, run: Run, backbone: Backbone, *, images: Path | None) -> LoadedRun:
        """Load a run's model, note what it answers, and compile it.

        Raises:
            SpecError: The task's name or the images cannot be used.
            ExportError: The prompts cannot be compiled.
            BundleCorruptError: The run is damaged.
        """
        check_task_name(run.card.name)
        model = run.load_model(backbone)
        chosen = gate_images(run, images)
        expectation = Expectation(
            task=run.card.name,
            pixels=chosen.pixels,
            logits=expected_logits(model, chosen.pixels, run.card.preprocessing),
            source=chosen.source,
        )
        return cls(
            run=run,
            model=model,
            prompts=compile_prompts(model),
            card=_published_card(run.card),
            expectation=expectation,
        )


def _published_card(card: TaskCard) -> TaskCard:
    """Return the card as artifacts carry it: no search report, and of the trainer's own paths only the last part."""
    stored = card.details.get("hyperparameters")
    settings = dict(stored) if isinstance(stored, Mapping) else {}
    for name in ("data", "weights"):
        if name in settings:
            settings[name] = Path(str(settings[name])).name
    return replace(card, details={**card.details, "hyperparameters": settings, "pruning": None})
