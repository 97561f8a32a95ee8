"""Checkpoints in the public code's format, and what the public code's modules computed for them.

Needs torch and timm; import it inside tests of the training and export packages only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vpdeploy_train.importing.backbone import BackboneChoice
from vpdeploy_train.importing.importing import import_checkpoint
from vpdeploy_train.run import Run

FOLDER = Path(__file__).parent / "parity"

CASES = [
    ("vpt_shallow_toy", "plain"),
    ("vpt_deep_toy", "plain"),
    ("e2vpt_toy", "unpruned"),
    ("e2vpt_toy", "pruned"),
    ("vapt_toy", "plain"),
]
FORMATS = {"vpt_shallow_toy": "vpt", "vpt_deep_toy": "vpt", "e2vpt_toy": "e2vpt", "vapt_toy": "vapt"}
METHODS = {"vpt_shallow_toy": "vpt-shallow", "vpt_deep_toy": "vpt-deep", "e2vpt_toy": "e2vpt", "vapt_toy": "vapt"}

TOKEN_MASK = "enc.transformer.prompt_soft_tokens_mask_cls_token"
SEGMENT_MASK = "enc.transformer.prompt_soft_tokens_pieces_mask_cls_token"

State = dict[str, Tensor]
Arrays = dict[str, npt.NDArray[Any]]


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.pth"


def read_state(name: str) -> State:
    """Return a checkpoint's tensors."""
    return dict(torch.load(path_of(name), map_location="cpu", weights_only=True)["model"])


def read_expected(name: str) -> Arrays:
    """Return images, normalisation, and features and logits of every case, float64."""
    with np.load(FOLDER / f"{name}.expected.npz") as expected:
        return {key: expected[key] for key in expected.files}


def save(path: Path, state: State) -> Path:
    """Write a checkpoint as the public code does."""
    torch.save({"model": state}, path)
    return path


def import_case(name: str, case: str, folder: Path) -> Run:
    """Import one case; the masks of ``unpruned`` are ones, those in the file are of ``pruned``."""
    path = path_of(name)
    if case == "unpruned":
        state = read_state(name)
        for key in (TOKEN_MASK, SEGMENT_MASK):
            state[key] = torch.ones_like(state[key])
        path = save(folder / f"{name}.{case}.pth", state)
    heads = None if name == "e2vpt_toy" else 3
    return import_checkpoint(
        path,
        folder / f"{name}-{case}",
        format=FORMATS[name],
        name=f"{name}-{case}",
        backbone=BackboneChoice(heads=heads),
    ).run


def difference(found: npt.NDArray[Any], reference: npt.NDArray[Any]) -> float:
    """Return the largest difference as a share of the reference's largest value."""
    assert found.shape == reference.shape
    return float(np.abs(found - reference).max() / np.abs(reference).max())
