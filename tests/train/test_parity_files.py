"""Checkpoints in the reference repositories' format give the features and logits that the reference modules gave."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from train.toys import dimensions_of, features_with_prefixes

from vpdeploy_export.compilation import compile_prefix, merge_equal_columns
from vpdeploy_train.methods.e2vpt import E2VPT, Kept
from vpdeploy_train.prompted import PromptedViT

FOLDER = Path(__file__).parent.parent / "parity"
TOLERANCE = 1e-9
CASES = [("e2vpt_toy", "unpruned"), ("e2vpt_toy", "pruned"), ("vpt_deep_toy", "plain")]

State = dict[str, Tensor]


def read(name: str) -> tuple[State, dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Return a checkpoint's tensors, its dimensions and the expected results."""
    state = torch.load(FOLDER / f"{name}.pth", map_location="cpu", weights_only=True)["model"]
    sizes = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    with np.load(FOLDER / f"{name}.expected.npz") as expected:
        return state, sizes, {key: expected[key] for key in expected.files}


def build_backbone(state: State, sizes: dict[str, Any]) -> VisionTransformer:
    """Bring the reference's backbone tensors to timm's names."""
    embeddings, encoder = "enc.transformer.embeddings", "enc.transformer.encoder"
    renamed = {
        "cls_token": state[f"{embeddings}.cls_token"],
        "pos_embed": state[f"{embeddings}.position_embeddings"],
        "patch_embed.proj.weight": state[f"{embeddings}.patch_embeddings.weight"],
        "patch_embed.proj.bias": state[f"{embeddings}.patch_embeddings.bias"],
        "norm.weight": state[f"{encoder}.encoder_norm.weight"],
        "norm.bias": state[f"{encoder}.encoder_norm.bias"],
    }
    names = {"attention_norm": "norm1", "ffn_norm": "norm2", "attn.out": "attn.proj"}
    names |= {"ffn.fc1": "mlp.fc1", "ffn.fc2": "mlp.fc2"}
    for index in range(sizes["depth"]):
        theirs, ours = f"{encoder}.layer.{index}", f"blocks.{index}"
        for kind in ("weight", "bias"):
            parts = [state[f"{theirs}.attn.{part}.{kind}"] for part in ("query", "key", "value")]
            renamed[f"{ours}.attn.qkv.{kind}"] = torch.cat(parts)
            for their_name, our_name in names.items():
                renamed[f"{ours}.{our_name}.{kind}"] = state[f"{theirs}.{their_name}.{kind}"]
    vit = VisionTransformer(
        img_size=sizes["image_size"],
        patch_size=sizes["patch_size"],
        embed_dim=sizes["width"],
        depth=sizes["depth"],
        num_heads=sizes["heads"],
        mlp_ratio=sizes["mlp_ratio"],
        norm_layer=partial(nn.LayerNorm, eps=sizes["layer_norm_eps"]),
        num_classes=0,
    )
    vit.load_state_dict(renamed, strict=True)
    return vit.eval().requires_grad_(False)


def build_model(name: str, case: str) -> tuple[PromptedViT, dict[str, npt.NDArray[Any]]]:
    """Return the prompted model of one case in float64; pruned tokens are zeros, as in the reference."""
    state, sizes, expected = read(name)
    vit = build_backbone(state, sizes)
    tokens, kv_tokens, depth = sizes["prompt_tokens"], sizes["kv_tokens"], sizes["depth"]
    token_mask = torch.from_numpy(expected.get(f"{case}.token_mask", np.ones(tokens, dtype=np.float32)))
    segment_mask = expected.get(f"{case}.segment_mask", np.ones((tokens, 16)))
    rows = tuple(tuple(bool(flag) for flag in row) for row in segment_mask)
    everything = Kept.everything(depth, tokens, kv_tokens)
    kept = Kept(tokens=everything.tokens, kv_tokens=everything.kv_tokens, segments=(rows,) * depth)
    method = E2VPT(dimensions_of(vit), kept, segment_order="strided")
    prompts = torch.cat([state["enc.transformer.prompt_embeddings"], state["enc.transformer.deep_prompt_embeddings"]])
    values = {f"visual.{index}": prompts[index] * token_mask[:, None] for index in range(depth)}
    for index in range(depth):
        none = torch.zeros(sizes["heads"], 0, sizes["width"] // sizes["heads"])
        key = f"enc.transformer.encoder.layer.{index}.attn.deep_QKV_embeddings"
        values[f"kv.{index}"] = state.get(key, none)
    method.load_state_dict(values, strict=True)
    model = PromptedViT(vit, method, sizes["classes"])
    model.head.weight.data = state["head.last_layer.weight"]
    model.head.bias.data = state["head.last_layer.bias"]
    return model.double().eval(), expected


def normalise(expected: dict[str, npt.NDArray[Any]]) -> Tensor:
    pixels = (expected["images"].astype(np.float64) / 255 - expected["mean"]) / expected["std"]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def assert_expected(model: PromptedViT, features: Tensor, expected: dict[str, npt.NDArray[Any]], case: str) -> None:
    logits = model.head(features)
    for found, name in ((features, "cls_feature"), (logits, "logits")):
        reference = expected[f"{case}.{name}"]
        assert found.shape == reference.shape
        assert np.abs(found.numpy() - reference).max() / np.abs(reference).max() < TOLERANCE


@pytest.mark.parametrize(("name", "case"), CASES)
def test_the_trained_form_reproduces_the_reference(name, case):
    model, expected = build_model(name, case)
    with torch.no_grad():
        assert_expected(model, model.features(normalise(expected)), expected, case)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_the_compiled_and_merged_prefix_reproduces_the_reference(name, case):
    model, expected = build_model(name, case)
    prefixes = compile_prefix(model)
    merged = [merge_equal_columns(prefix) for prefix in prefixes]
    # Two of eight tokens are pruned, and become one column.
    assert [prefix.key.shape[1] for prefix in prefixes] == [13 if name == "e2vpt_toy" else 6] * 3
    assert [prefix.key.shape[1] for prefix in merged] == [12 if case == "pruned" else len(prefixes[0].bias)] * 3
    with torch.no_grad():
        pixels = normalise(expected)
        assert_expected(model, features_with_prefixes(model.vit, pixels, prefixes), expected, case)
        assert_expected(model, features_with_prefixes(model.vit, pixels, merged), expected, case)


def test_the_masks_stored_in_the_checkpoint_are_those_of_the_pruned_case():
    state, _, expected = read("e2vpt_toy")
    stored = state["enc.transformer.prompt_soft_tokens_mask_cls_token"].numpy()
    pieces = state["enc.transformer.prompt_soft_tokens_pieces_mask_cls_token"].numpy()
    assert np.array_equal(stored, expected["pruned.token_mask"])
    assert np.array_equal(pieces, expected["pruned.segment_mask"])


def test_removing_the_pruned_tokens_is_another_function_than_the_references_zeros():
    model, expected = build_model("e2vpt_toy", "pruned")
    live = tuple(np.flatnonzero(expected["pruned.token_mask"]).tolist())
    kept = Kept(
        tokens=(live,) * 3,
        kv_tokens=model.method.kept.kv_tokens,
        segments=tuple(tuple(block[token] for token in live) for block in model.method.kept.segments),
    )
    smaller = PromptedViT(model.vit, model.method.pruned_to(kept, model.method.state_dict()), 7).double().eval()
    with torch.no_grad():
        removed = smaller.features(normalise(expected)).numpy()
    reference = expected["pruned.cls_feature"]
    assert np.abs(removed - reference).max() / np.abs(reference).max() > 1e-3
