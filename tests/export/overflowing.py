"""Tiny backbones whose activations leave float16's range in one place, and what they answer is still ordinary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import tiny_runs
from torch import Tensor

from vpdeploy_train.methods.kept import Kept

State = dict[str, Tensor]


def overflow_mlp(state: State) -> None:
    """Block 1's hidden units reach 1e5; its second layer brings them back."""
    for name in ("weight", "bias"):
        state[f"blocks.1.mlp.fc1.{name}"] *= 32768
    state["blocks.1.mlp.fc2.weight"] /= 32768


def overflow_residual(state: State) -> None:
    """One channel of the tokens reaches 1e5 between block 0 and block 2, which takes it back."""
    for block, shift in enumerate((5e4, 5e4, -1e5)):
        state[f"blocks.{block}.mlp.fc2.bias"][5] += shift


def overflow_logits(state: State) -> None:
    """All keys of block 1 share a large offset: every logit of a query moves alike, and softmax does not see it."""
    state["blocks.1.attn.qkv.bias"][tiny_runs.WIDTH : 2 * tiny_runs.WIDTH] += 12000.0
    state["blocks.1.attn.qkv.bias"][: tiny_runs.WIDTH] += 3.0


CASES: dict[str, Callable[[State], None]] = {
    "mlp": overflow_mlp,
    "residual": overflow_residual,
    "logits": overflow_logits,
}


def write_run(folder: Path, case: str) -> Path:
    """Write a run of VPT-deep prompts on the case's backbone."""
    state = safetensors.torch.load_file(tiny_runs.write_weights(folder / "plain.safetensors"))
    CASES[case](state)
    weights = folder / f"{case}.safetensors"
    safetensors.torch.save_file(state, weights)
    kept = Kept.everything(tiny_runs.DEPTH, 4, 0)
    tiny_runs.write_run(folder / case, weights, name=case, classes=5, kept=kept, method="vpt-deep", seed=3)
    return folder / case
