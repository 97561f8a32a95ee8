"""What the quickstart trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from vpdeploy_train.settings import TrainSettings


@dataclass(frozen=True, kw_only=True)
class PlannedTask:
    """One task of the quickstart.

    Attributes:
        name: The task's name.
        settings: How it is trained.
        about: What it asks, in a few words.
    """

    name: str
    settings: TrainSettings
    about: str


def _settings(data: str, *, epochs: int, prune: bool = False) -> TrainSettings:
    """Return settings that reach a good accuracy in few epochs on a CPU.

    The classifier starts at the linear probe and moves slowly; the prompts, which start at random, move fast.
    """
    return TrainSettings.of(
        data=data,
        method="e2vpt",
        prompt_tokens=8,
        kv_tokens=4,
        prompt_dropout=0.0,
        epochs=epochs,
        batch_size=32,
        lr=3.2,
        device="cpu",
        prune=prune,
        keep="0.5",
        score_images=320,
        prune_slack=0.02,
    )


PLAN: Final = (
    PlannedTask(name="digit", about="which digit", settings=_settings("digits", epochs=5)),
    PlannedTask(name="parity", about="even or odd digit", settings=_settings("digits:parity", epochs=3, prune=True)),
    PlannedTask(name="location", about="where the shape lies", settings=_settings("shapes:location", epochs=2)),
)
"""Three tasks on one backbone; the second is pruned and rewound."""
