"""What tests of the importer share: an import with few words, changed checkpoints, and refusals that leave nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from parity_files import State, read_state, save

from vpdeploy.errors import SpecError
from vpdeploy_train.importing.backbone import BackboneChoice
from vpdeploy_train.importing.importing import import_checkpoint
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.run import Run

PROMPTS = "enc.transformer.prompt_embeddings"
DEEP = "enc.transformer.deep_prompt_embeddings"
POSITIONS = "enc.transformer.embeddings.position_embeddings"
KEY_VALUES = "enc.transformer.encoder.layer.{}.attn.deep_QKV_embeddings"
KERNEL = "enc.transformer.deep_prompt_downsample.0.conv.kernel"
LINEAR = "enc.transformer.deep_prompt_downsample.1.linear.weight"
HEADS = BackboneChoice(heads=3)


def importing(path: Path, out: Path, *, format: str = "vpt", backbone: BackboneChoice = HEADS, **options: Any) -> Run:
    return import_checkpoint(path, out, format=format, name="toy", backbone=backbone, **options).run


def model_of(run: Run) -> PromptedViT:
    written = Run.read(run.path)
    return written.load_model(written.load_backbone())


def changed(tmp_path: Path, name: str, change: Callable[[State], object]) -> Path:
    state = read_state(name)
    change(state)
    return save(tmp_path / "changed.pth", state)


def assert_refused(path: Path, match: str, **options: Any) -> None:
    """Nothing is written beside the file, and the message is one line."""
    before = sorted(path.parent.iterdir())
    with pytest.raises(SpecError, match=match) as refused:
        importing(path, path.parent / "out", **options)
    assert "\n" not in str(refused.value)
    assert sorted(path.parent.iterdir()) == before
