"""Which backbone an imported run has."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import timm
import torch
from parity_files import State, path_of, save
from train.imports import (
    DEEP,
    POSITIONS,
    PROMPTS,
    assert_refused,
    changed,
    importing,
    model_of,
)
from train.toys import random_pixels

from vpdeploy_train.backbone import load_backbone
from vpdeploy_train.importing.architecture import STANDARD, name_architecture
from vpdeploy_train.importing.backbone import BackboneChoice
from vpdeploy_train.importing.vit import StoredViT
from vpdeploy_train.run import Run


def stored(width: int, depth: int, hidden: int, *, patch_size: int = 16, grid: int = 14) -> StoredViT:
    return StoredViT(width=width, depth=depth, hidden=hidden, patch_size=patch_size, grid=grid, tensors={})


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        (stored(192, 12, 768), "vit_tiny_patch16_224"),
        (stored(384, 12, 1536, patch_size=32, grid=7), "vit_small_patch32_224"),
        (stored(768, 12, 3072), "vit_base_patch16_224"),
        (stored(768, 12, 3072, grid=24), "vit_base_patch16_384"),
        (stored(768, 12, 3072, grid=28), "vit_base_patch16_224"),  # 448 pixels: timm has no name for them
        (stored(1024, 24, 4096), "vit_large_patch16_224"),
        (stored(1280, 32, 5120, patch_size=14, grid=16), "vit_huge_patch14_224"),
        (stored(768, 12, 3072, patch_size=4, grid=8), "plain_vit_patch4_32_w768_d12_h12_m3072"),
    ],
    ids=str,
)
def test_a_standard_vit_is_known_by_its_sizes_and_this_is_said(caplog, sizes: StoredViT, name: str):
    with caplog.at_level(logging.INFO, logger="vpdeploy.import"):
        assert name_architecture("file", sizes, heads=None) == name
    title = STANDARD[sizes.width, sizes.depth, sizes.hidden].title
    assert f"those of {title}" in caplog.text


def test_other_heads_than_a_standard_vits_are_another_architecture():
    assert name_architecture("file", stored(768, 12, 3072), heads=6) == "plain_vit_patch16_224_w768_d12_h6_m3072"


def test_the_backbone_of_a_standard_size_has_the_digest_of_timms_model(tmp_path: Path):
    """So that imported and trained runs on one backbone share a bundle."""
    width, tokens = 192, 2
    vit = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, img_size=32)
    theirs = vit.state_dict()
    state = {"enc.transformer.embeddings.cls_token": theirs["cls_token"], POSITIONS: theirs["pos_embed"]}
    for kind in ("weight", "bias"):
        state[f"enc.transformer.embeddings.patch_embeddings.{kind}"] = theirs[f"patch_embed.proj.{kind}"]
        state[f"enc.transformer.encoder.encoder_norm.{kind}"] = theirs[f"norm.{kind}"]
        state[f"head.last_layer.{kind}"] = torch.zeros((2, width) if kind == "weight" else (2,))
        for index in range(12):
            layer, block = f"enc.transformer.encoder.layer.{index}", f"blocks.{index}"
            parts = theirs[f"{block}.attn.qkv.{kind}"].chunk(3)
            for part, value in zip(("query", "key", "value"), parts, strict=True):
                state[f"{layer}.attn.{part}.{kind}"] = value.clone()
            state[f"{layer}.attn.out.{kind}"] = theirs[f"{block}.attn.proj.{kind}"]
            state[f"{layer}.attention_norm.{kind}"] = theirs[f"{block}.norm1.{kind}"]
            state[f"{layer}.ffn_norm.{kind}"] = theirs[f"{block}.norm2.{kind}"]
            for number in (1, 2):
                state[f"{layer}.ffn.fc{number}.{kind}"] = theirs[f"{block}.mlp.fc{number}.{kind}"]
    state[PROMPTS], state[DEEP] = torch.zeros(1, tokens, width), torch.zeros(11, tokens, width)
    path = save(tmp_path / "tiny.pth", state)
    run = importing(path, tmp_path / "out", backbone=BackboneChoice())
    torch.save(theirs, tmp_path / "timm.pth")
    backbone = load_backbone("vit_tiny_patch16_224", weights=tmp_path / "timm.pth", image_size=32)
    assert run.card.backbone == backbone.identity
    assert Run.read(run.path).load_backbone().identity == backbone.identity
    other = BackboneChoice(name="vit_tiny_patch16_224.augreg_in21k")
    assert importing(path, tmp_path / "tagged", backbone=other).card.backbone.sha256 == backbone.identity.sha256


def test_prompts_without_a_backbone_take_the_one_that_is_named(tmp_path: Path):
    whole = importing(path_of("vpt_deep_toy"), tmp_path / "whole")

    def drop(state: State) -> None:
        for key in [key for key in state if ".embeddings." in key or ".encoder." in key]:
            del state[key]

    path = changed(tmp_path, "vpt_deep_toy", drop)
    weights = whole.path / "backbone.safetensors"
    choice = BackboneChoice(name=whole.card.backbone.name, weights=weights)
    run = importing(path, tmp_path / "prompts", backbone=choice)
    assert run.card.backbone == whole.card.backbone
    assert not (run.path / "backbone.safetensors").exists()
    pixels = random_pixels(2, side=64, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model_of(run)(pixels), model_of(whole)(pixels))
    assert_refused(path, "holds no backbone; give --backbone")
    assert_refused(path, "plain_vit_.* has no pretrained weights", backbone=BackboneChoice(name=choice.name))


def test_adaptive_prompts_without_a_backbone_name_the_image_size_they_need(tmp_path: Path):
    whole = importing(path_of("vapt_toy"), tmp_path / "whole", format="vapt")

    def drop(state: State) -> None:
        for key in [key for key in state if ".embeddings." in key or ".encoder." in key]:
            del state[key]

    path = changed(tmp_path, "vapt_toy", drop)
    small = BackboneChoice(name=whole.card.backbone.name, weights=whole.path / "backbone.safetensors", image_size=64)
    assert_refused(path, "grid of 14x14 patches, .* 4x4; .* give --image-size 224", format="vapt", backbone=small)


@pytest.mark.parametrize(
    ("choice", "match"),
    [
        (BackboneChoice(), "heads is not stored, and 3 blocks of width 48, .* give --heads H, or --backbone"),
        (BackboneChoice(heads=5), "48 cannot be divided into 5 heads; correct --heads"),
        (BackboneChoice(name="vit_mini_patch8_64"), r"its backbone \(3 blocks .*\) is no vit_mini_patch8_64; give"),
        (BackboneChoice(name="vit_bas"), "unknown backbone 'vit_bas'; did you mean"),
        (BackboneChoice(heads=3, image_size=64), "--image-size: .* holds its own backbone"),
        (BackboneChoice(heads=3, weights=Path("x")), "--weights: .* holds its own backbone"),
    ],
    ids=str,
)
def test_a_backbone_that_cannot_be_is_refused(tmp_path: Path, choice: BackboneChoice, match: str):
    path = changed(tmp_path, "vpt_deep_toy", lambda state: None)
    assert_refused(path, match, backbone=choice)


def test_heads_that_contradict_the_key_value_prompts_are_refused(tmp_path: Path):
    path = changed(tmp_path, "e2vpt_toy", lambda state: None)
    assert_refused(path, "--heads 4: the key/value prompts .* have 3", format="e2vpt", backbone=BackboneChoice(heads=4))


def test_a_backbone_whose_tensors_would_be_resampled_is_refused(tmp_path: Path):
    """timm brings patches and positions of other sizes into shape; the digest tells."""
    path = changed(tmp_path, "vpt_deep_toy", lambda state: None)
    name = "plain_vit_patch8_64_w48_d3_h3_m192"
    assert_refused(path, "is no plain_vit_patch8_64", backbone=BackboneChoice(name=name))
