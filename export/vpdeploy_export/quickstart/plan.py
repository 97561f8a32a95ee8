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


def _settings(data: str, *, epochs: int, prune: bool = False, keep: str = "auto") -> TrainSettings:
    """Return settings that reach a good accuracy in few epochs on a CPU."""
    return TrainSettings(
        data=data,
        method="e2vpt",
        prompt_tokens=8,
        kv_tokens=4,
        epochs=epochs,
        batch_size=32,
        optimizer="adamw",
        lr=0.12,
        prompt_dropout=0.0,
        device="cpu",
        prune=prune,
        keep=keep,
        prune_trials=1,
        prune_slack=0.01,
    )


PLAN: Final = (
    PlannedTask(name="digit", about="which digit", settings=_settings("digits", epochs=5, prune=True, keep="0.5")),
    PlannedTask(name="loops", about="closed loops in a digit", settings=_settings("digits:loops", epochs=5)),
    PlannedTask(name="count", about="how many shapes", settings=_settings("shapes:count", epochs=5)),
)
"""Three tasks on one backbone; the first is pruned and rewound."""
