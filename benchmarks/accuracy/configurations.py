"""What is compared: prompt methods with their settings, and the learning rates tried on validation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vpdeploy_train.config import SharedSettings

RECIPE: Mapping[str, Any] = SharedSettings(
    {
        "optimizer": "adamw",
        "resize": "squash",  # the whole image: where something lies may be the question
        "augment": "none",  # a mirrored or cropped image may have another answer
        "prompt_tokens": 10,
        "kv_tokens": 5,
        "head": "probe",
    }
)
"""Settings of every trained configuration; all others are the trainer's defaults."""

PROMPT_RATES = (0.1, 0.03, 0.3)
BACKBONE_RATES = (4e-4, 1e-4, 2e-3)

PRUNING: Mapping[str, Any] = {
    "prune": True,
    "prune_scope": "layer",
    "prune_search": "full",
    "prune_slack": 0.03,  # the standard error of an accuracy on 64 to 200 validation images
    "rewind": "initial",
}
"""The shares tried are ``--keep``, each at the price of one retraining. 0.4 of T=10 and T_KV=5, with the default 0.75
of the segments, is exactly half of VPT-deep's prompt parameters."""


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One line of the table.

    Attributes:
        title: Its name in the table.
        method: The trainer's name of the method.
        rates: Learning rates for batches of 256 in the order in which they are tried, as many as ``--trials`` says.
        settings: What differs from ``RECIPE``.
        continues: The configuration whose finished run, at its chosen rate, this one prunes.
    """

    title: str
    method: str
    rates: tuple[float, ...] = PROMPT_RATES
    settings: Mapping[str, Any] = field(default_factory=dict)
    continues: str | None = None


CONFIGURATIONS: dict[str, Configuration] = {
    "linear": Configuration(title="linear probe", method="linear", rates=()),
    "vpt-shallow": Configuration(title="VPT-shallow", method="vpt-shallow"),
    "vpt-deep": Configuration(title="VPT-deep", method="vpt-deep"),
    "e2vpt": Configuration(title="E²VPT, unpruned", method="e2vpt"),
    "e2vpt-pruned": Configuration(
        title="E²VPT, pruned and rewound", method="e2vpt", settings=PRUNING, continues="e2vpt"
    ),
    "vapt": Configuration(title="VAPT", method="vapt"),
    "vapt-pruned": Configuration(title="VAPT, pruned and rewound", method="vapt", settings=PRUNING, continues="vapt"),
    "lora": Configuration(title="LoRA", method="lora", rates=(4e-3, 1e-3, 1e-2)),
    "full": Configuration(title="full fine-tuning", method="full", rates=BACKBONE_RATES),
}


def in_order(names: list[str]) -> list[str]:
    """Return the named configurations with what they continue before them, each once."""
    wanted = {*names, *(CONFIGURATIONS[name].continues for name in names)}
    return [name for name in CONFIGURATIONS if name in wanted]
