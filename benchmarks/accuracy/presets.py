"""Two sizes of the benchmark: what a CPU does in an hour, and all of it."""

from __future__ import annotations

import argparse
from typing import Any

ALL_CONFIGURATIONS = ["linear", "vpt-deep", "e2vpt", "e2vpt-pruned", "vapt", "vapt-pruned", "full"]

PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {
        "tasks": ["fashion", "solar-cells", "location"],
        "train_images": 400,
        "test_images": 400,
        "image_size": 70,
        "configurations": ALL_CONFIGURATIONS,
        "seeds": [0, 1, 2],
        "epochs": 9,
        "batch_size": 32,
        "keep": "0.4",
        "trials": 1,
        "precision": "bf16",
    },
    "gpu": {
        "tasks": ["fashion", "emoji", "solar-cells", "climate", "count", "location", "mnist", "animals"],
        "train_images": 1000,
        "test_images": 700,
        "image_size": 112,
        "configurations": ALL_CONFIGURATIONS,
        "seeds": [0, 1, 2, 3, 4],
        "epochs": 50,
        "batch_size": 64,
        "keep": "0.4,0.2",
        "trials": 3,
        "precision": "fp32",
    },
}


def add_preset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="defaults of all options that say 'preset'")


def apply_preset(options: argparse.Namespace) -> None:
    """Fill in what was not given."""
    for name, value in PRESETS[options.preset].items():
        if getattr(options, name, value) is None:
            setattr(options, name, value)
