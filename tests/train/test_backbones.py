"""Families of backbones: without prompts they are timm's own models, and a prefix is prompts run as tokens."""

from __future__ import annotations

import re
from pathlib import Path

import architectures
import pytest
import safetensors.torch
import timm
import tiny_runs
import torch
from architectures import ALL, PLAIN, ROTARY, SWIN
from torch import Tensor, nn

from vpdeploy.errors import SpecError
from vpdeploy_train.architectures import create_plain, plain_name
from vpdeploy_train.backbone import load_backbone
from vpdeploy_train.methods import METHODS
from vpdeploy_train.methods.method import NoPrompts, PromptDimensions
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.trunks import trunk_of

EXACT = 1e-9
"""Relative error that float64 leaves to equal functions of a different order of operations."""

NAME = "plain_vit_patch16_64_w48_d3_h3_m100"


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest error relative to the largest expected value."""
    assert found.shape == expected.shape
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize("case", ALL)
def test_without_prompts_the_features_are_timms_own(case):
    model = architectures.make(case)
    pixels = architectures.random_images(model)
    with torch.no_grad():
        expected = model(pixels)
        assert difference(expected[:1], expected[1:]) > 1e-3
        assert difference(PromptedViT(model, NoPrompts(), 3).features(pixels), expected) < 2e-5
        model.double()
        pixels = pixels.double()
        assert difference(PromptedViT(model, NoPrompts(), 3).features(pixels), model(pixels)) < EXACT


@pytest.mark.parametrize("case", ALL)
def test_a_prefix_is_prompts_run_as_tokens(case):
    model = architectures.make(case).double()
    pixels = architectures.random_images(model)
    prompted = architectures.with_prompts(model, kv_tokens=0).double()
    prompts = [row.detach() for row in prompted.method.visual]
    with torch.no_grad():
        expected = architectures.features_of_tokens(model, pixels, prompts)
        assert difference(prompted.features(pixels), expected) < EXACT
        assert difference(model(pixels), expected) > 1e-3


@pytest.mark.parametrize("case", ["MAE's pooling", "averages, no class token", "DINOv3", "EVA-02"])
def test_published_pooling_averages_over_patches_and_prompts(case):
    model = architectures.make(case).double()
    pixels = architectures.random_images(model)
    method = architectures.prompts_for(model, kv_tokens=0).double()
    prompts = [row.detach() for row in method.visual]
    with torch.no_grad():
        found = PromptedViT(model, method, 3, pools_prompts=True).eval().double().features(pixels)
        expected = architectures.features_of_tokens(model, pixels, prompts, pools=True)
        assert difference(found, expected) < EXACT
        assert difference(architectures.features_of_tokens(model, pixels, prompts), expected) > 1e-3


@pytest.mark.parametrize("case", ["ViT-Ti/16", "SigLIP", "Swin-T"])
def test_published_pooling_is_refused_where_no_rows_are_averaged(case):
    model = architectures.make(case)
    with pytest.raises(SpecError, match="--pooling published: this backbone's feature does not average over tokens"):
        PromptedViT(model, NoPrompts(), 3, pools_prompts=True)


@pytest.mark.parametrize("case", ["Swin-T", "EVA-02", "DINOv3"])
def test_every_prompt_gets_a_gradient(case):
    model = architectures.with_prompts(architectures.make(case))
    model(architectures.random_images(model.vit)).square().sum().backward()
    for name, parameter in model.method.named_parameters():
        assert float(parameter.grad.abs().max()) > 0, name


@pytest.mark.parametrize("case", ["Swin-T", "EVA-02", "DINOv3"])
def test_the_metric_loss_of_da_vpt_reaches_the_prompts_of_every_block(case):
    model = architectures.make(case)
    options = METHODS["da-vpt"].Options(prompt_tokens=3)
    method = METHODS["da-vpt"].create(PromptDimensions.of(trunk_of(model)), options, torch.Generator().manual_seed(0))
    PromptedViT(model, method, 3).train()(architectures.random_images(model))
    method.training_loss(torch.arange(2) % 3).backward()
    assert all(float(parameter.grad.abs().max()) > 0 for parameter in method.visual)


def test_a_hierarchy_gives_each_block_its_own_width_and_heads():
    trunk = trunk_of(architectures.make("Swin-T"))
    assert [(stage.depth, stage.width, stage.heads) for stage in trunk.stages] == [
        (1, 48, 3),
        (2, 96, 6),
        (1, 192, 12),
        (1, 384, 24),
    ]
    method = architectures.prompts_for(trunk.model)
    assert [tuple(row.shape) for row in method.visual] == [(2, 48), (3, 96), (3, 96), (3, 192), (3, 384)]
    assert [tuple(row.shape) for row in method.kv][:2] == [(3, 2, 16), (6, 2, 16)]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("vapt", "method 'vapt' needs a backbone whose blocks share one patch grid; use e2vpt or vpt-deep"),
        ("vpt-shallow", "method 'vpt-shallow' needs a plain ViT: its prompts stay tokens; use e2vpt or vpt-deep"),
        ("lora", "method 'lora' is written for plain ViTs; use e2vpt or vpt-deep"),
    ],
)
def test_methods_that_need_rows_are_refused_on_a_hierarchy(method, message):
    dimensions = PromptDimensions.of(trunk_of(architectures.make("Swin-T")))
    with pytest.raises(SpecError, match=re.escape(message)):
        METHODS[method].create(dimensions, METHODS[method].Options(), torch.Generator())


def test_lora_is_refused_where_query_key_and_value_are_three_projections():
    model = architectures.make("EVA-02 with three projections")
    method = METHODS["lora"].create(PromptDimensions.of(trunk_of(model)), METHODS["lora"].Options(), torch.Generator())
    with pytest.raises(SpecError, match="method 'lora' needs query, key and value in one projection"):
        PromptedViT(model, method, 3)


@pytest.mark.parametrize("case", ["DINOv3", "EVA-02"])
@pytest.mark.parametrize("method", ["vapt", "vpt-shallow", "lora"])
def test_all_methods_run_on_rotary_positions(case, method):
    model = architectures.make(case)
    options = tiny_runs.options_for(method, prompt_tokens=3, vapt_hidden=2, lora_rank=2)
    prompts = METHODS[method].create(PromptDimensions.of(trunk_of(model)), options, torch.Generator().manual_seed(0))
    prompted = PromptedViT(model, prompts, 3)
    prompted(architectures.random_images(model)).square().sum().backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in prompts.parameters())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("resnet18", "it is a ResNet, prompts enter timm's VisionTransformer, Eva, SwinTransformer; "),
        ("deit_tiny_distilled_patch16_224", "it is a VisionTransformerDistilled, its feature is the mean of a class "),
        ("swinv2_tiny_window8_256", "it is a SwinTransformerV2, its attention compares angles "),
        ("beit_base_patch16_224", "it is a Beit, its position bias lies between all rows"),
        ("vit_base_patch16_rpn_224", "its blocks are ResPostBlock; "),
        ("vit_base_patch16_xp_224", "its blocks are ParallelScalingBlock; "),
        ("vit_dwee_patch16_reg1_gap_256", "its attention is DiffAttention; "),
        ("vit_tiny_r_s16_p8_224", "its patches come from a HybridEmbed, not from one projection; "),
        ("vit_large_patch16_sapiens2", "its keys and values are shared by groups of heads; "),
        ("vit_base_patch16_sapiens2", "its patches or images are not square ((16, 16), (1024, 768)); "),
    ],
)
def test_a_backbone_that_prompts_cannot_enter_is_refused_in_one_sentence(name, reason):
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, num_classes=0)
    with pytest.raises(SpecError, match=re.escape(f"backbone '{name}' cannot take prompts: {reason}")) as caught:
        trunk_of(model, name)
    assert "docs/backbones.md" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_image_size_of_a_refused_backbone_is_no_other_error():
    with pytest.raises(SpecError, match="backbone 'resnet18' cannot take prompts: it is a ResNet, "):
        load_backbone("resnet18", image_size=64)


@pytest.mark.parametrize("family", [PLAIN, ROTARY, SWIN])
def test_a_part_that_is_exchanged_is_refused_by_name(family):
    model = architectures.make(next(iter(family)))
    block = trunk_of(model).blocks[-1]
    block.attn = nn.Identity()
    with pytest.raises(SpecError, match="cannot take prompts: its attention is Identity; "):
        trunk_of(model)


def test_a_name_carries_the_dimensions_of_a_plain_backbone():
    name = plain_name(patch_size=16, image_size=64, width=48, depth=3, heads=3, hidden=100)
    assert name == NAME
    model = create_plain(name)
    block = model.blocks[0]
    assert (len(model.blocks), block.attn.num_heads, block.mlp.fc1.out_features) == (3, 3, 100)
    assert model.pos_embed.shape == (1, 17, 48)
    assert block.norm1.eps == model.norm.eps == 1e-6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plain_vit_patch16_64", "cannot be read: expected plain_vit_patch<P>_<IMAGE>_w<WIDTH>_d<DEPTH>_h<HEADS>_m"),
        ("plain_vit_patch16_60_w48_d3_h3_m4", "the image size should be a multiple of the patch size, found 60 and 16"),
        ("plain_vit_patch16_64_w48_d3_h5_m4", "the width should be a multiple of the heads, found 48 and 5"),
        ("plain_vit_patch16_64_w99999_d999_h1_m99999", "5.99e+04 billion parameters for 64 px images, 8 at most"),
        (f"plain_vit_patch16_64_w{'9' * 20}_d1_h1_m4", "cannot be read"),
        ("plain_vit_patch16_64_w48_d0_h3_m4", "depth and hidden units should be at least 1, found 0 and 4"),
        ("plain_vit_patch0_64_w48_d1_h3_m4", "the image size should be a multiple of the patch size, found 64 and 0"),
    ],
)
def test_impossible_dimensions_in_a_name_are_refused(name, message):
    with pytest.raises(SpecError, match=re.escape(message)):
        create_plain(name)


def test_a_backbone_named_by_its_dimensions_needs_weights():
    with pytest.raises(SpecError, match=f"backbone '{NAME}' has no pretrained weights: .* --weights FILE"):
        load_backbone(NAME)


def write(path: Path, state: dict[str, Tensor]) -> Path:
    safetensors.torch.save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path


def plain_state() -> dict[str, Tensor]:
    return tiny_runs.randomise(create_plain(NAME), 3).state_dict()


def test_a_backbone_named_by_its_dimensions_loads_and_resizes(tmp_path):
    path = write(tmp_path / "w.safetensors", plain_state())
    backbone = load_backbone(NAME, weights=path)
    assert (backbone.identity.name, backbone.identity.depth, backbone.image_size) == (NAME, 3, 64)
    larger = load_backbone(NAME, weights=path, image_size=96)
    assert larger.vit.pos_embed.shape == (1, 37, 48)
    assert torch.equal(larger.vit.pos_embed[:, :1], backbone.vit.pos_embed[:, :1])


@pytest.mark.parametrize("case", ["DINOv3", "EVA-02", "Swin-T"])
def test_weights_of_each_family_load_from_a_file(tmp_path, case, monkeypatch):
    name, options = ALL[case]
    state = architectures.make(case).state_dict()
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *names, **others: create(*names, **{**options, **others}))
    backbone = load_backbone(name, weights=write(tmp_path / "w.safetensors", state), image_size=options["img_size"])
    loaded = backbone.vit.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())
    assert backbone.identity.depth == len(trunk_of(backbone.vit).blocks)
    assert len(backbone.identity.stages) == (4 if case == "Swin-T" else 1)


def test_averaging_replaces_the_final_norm_by_a_fresh_one(tmp_path):
    state = plain_state()
    vit = load_backbone(NAME, weights=write(tmp_path / "w.safetensors", state), averages=True).vit
    assert torch.equal(vit.fc_norm.weight, torch.ones(48))
    assert torch.equal(vit.fc_norm.bias, torch.zeros(48))
    assert not any(parameter.requires_grad for parameter in vit.parameters())
    own = create_plain(NAME)
    own.load_state_dict(state)
    own.norm = nn.Identity()
    pixels = architectures.random_images(vit)
    with torch.no_grad():
        mean = own.eval().forward_features(pixels)[:, 1:].mean(1)
        expected = nn.functional.layer_norm(mean, (48,), eps=1e-6)
        assert difference(vit(pixels), expected) < 1e-5


def test_averaging_keeps_a_norm_that_was_trained_behind_the_mean(tmp_path):
    state = tiny_runs.randomise(create_plain(NAME, global_pool="avg"), 4).state_dict()
    vit = load_backbone(NAME, weights=write(tmp_path / "w.safetensors", state), averages=True).vit
    assert torch.equal(vit.fc_norm.weight, state["fc_norm.weight"])


def test_averaging_takes_pretrained_weights_of_the_class_token_model():
    vit = load_backbone("vit_mini_patch8_64", averages=True).vit
    own = load_backbone("vit_mini_patch8_64").vit
    assert torch.equal(vit.fc_norm.weight, torch.ones(160))
    assert torch.equal(vit.blocks[5].mlp.fc2.weight, own.blocks[5].mlp.fc2.weight)


@pytest.mark.parametrize("case", ["SigLIP", "DINOv2", "DINOv3", "Perception Encoder", "RoPE-ViT", "Swin-T"])
def test_every_family_can_average(tmp_path, case, monkeypatch):
    name, options = ALL[case]
    state = architectures.make(case).state_dict()
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *names, **others: create(*names, **{**options, **others}))
    path = write(tmp_path / "w.safetensors", state)
    model = load_backbone(name, weights=path, image_size=options["img_size"], averages=True).vit
    assert trunk_of(model).averages_rows is (case != "Swin-T")
    shared = {key: value for key, value in model.state_dict().items() if key in state}
    assert len(shared) > len(state) - 30
    assert all(torch.equal(value, state[key]) for key, value in shared.items())


def test_averaging_still_refuses_a_missing_block(tmp_path):
    state = plain_state()
    del state["blocks.2.norm1.weight"]
    with pytest.raises(SpecError, match=r"do not fit the architecture: .*blocks\.2\.norm1\.weight"):
        load_backbone(NAME, weights=write(tmp_path / "w.safetensors", state), averages=True)


def moco_checkpoint(state: dict[str, Tensor], *prefixes: str) -> dict[str, object]:
    """A checkpoint as MoCo-v3's code writes it: encoders with projectors as heads, and a predictor."""
    content: dict[str, Tensor] = {}
    if prefixes != ("module.",):
        content["module.predictor.0.weight"] = torch.zeros(4, 4)
    for number, prefix in enumerate(prefixes):
        content |= {f"{prefix}{key}": value + number for key, value in state.items()}
        content |= {f"{prefix}head.0.weight": torch.zeros(4, 48), f"{prefix}head.1.running_mean": torch.zeros(4)}
    return {"epoch": 300, "arch": "vit_base", "state_dict": content, "optimizer": {"state": {}, "param_groups": []}}


@pytest.mark.parametrize(
    "prefixes", [("module.base_encoder.", "module.momentum_encoder."), ("module.momentum_encoder.",), ("module.",)]
)
def test_a_moco_checkpoint_gives_its_first_encoder(tmp_path, prefixes):
    state = plain_state()
    torch.save(moco_checkpoint(state, *prefixes), tmp_path / "vit-b-300ep.pth.tar")
    loaded = load_backbone(NAME, weights=tmp_path / "vit-b-300ep.pth.tar").vit.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())


def test_mocos_small_vit_is_refused_for_an_architecture_of_other_heads(tmp_path):
    name = plain_name(patch_size=16, image_size=32, width=384, depth=1, heads=6, hidden=64)
    state = create_plain(name).state_dict()
    torch.save(moco_checkpoint(state, "module.base_encoder."), tmp_path / "vit-s.pth.tar")
    with pytest.raises(SpecError, match="MoCo-v3's ViT-S has 12 heads, the backbone has 6; use --backbone plain_vit_"):
        load_backbone(name, weights=tmp_path / "vit-s.pth.tar")


def test_a_full_mae_checkpoint_gives_its_encoder(tmp_path):
    state = plain_state()
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 48)}
    torch.save({"model": {**state, **decoder}}, tmp_path / "mae.pth")
    loaded = load_backbone(NAME, weights=tmp_path / "mae.pth", averages=True).vit.state_dict()
    assert torch.equal(loaded["blocks.1.attn.qkv.weight"], state["blocks.1.attn.qkv.weight"])


def test_google_weights_are_refused_for_another_pooling(tmp_path):
    (tmp_path / "w.npz").write_bytes(b"")
    with pytest.raises(SpecError, match=r"w\.npz: \.npz holds class-token ViTs in Google's layout"):
        load_backbone(NAME, weights=tmp_path / "w.npz", averages=True)
