"""Backbones: which are taken, which files give their weights, and what identifies them."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from train.toys import DEPTH, PATCH, SIDE, TOY, WIDTH, make_vit, random_pixels, randomise

from vpdeploy.errors import SpecError
from vpdeploy_train.backbone import digest_tensors, load_backbone
from vpdeploy_train.trunks import trunk_of


@pytest.fixture
def state(toy_weights: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(toy_weights)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("vit_base_patch16_244", "vit_base_patch16_224"), ("vit_mini_patch8", "vit_mini_patch8_64")],
)
def test_an_unknown_name_is_refused_with_a_close_one(name, suggestion):
    with pytest.raises(SpecError, match=f"unknown backbone '{name}'; did you mean .*{suggestion}"):
        load_backbone(name)


def test_a_name_like_no_other_is_refused_with_how_to_list_them():
    with pytest.raises(SpecError, match=r"unknown backbone 'zzz'; see timm\.list_models"):
        load_backbone("zzz")


@pytest.mark.parametrize(
    ("name", "kind"), [("resnet18", "ResNet"), ("deit_tiny_distilled_patch16_224", "VisionTransformerDistilled")]
)
def test_a_backbone_of_another_family_is_refused_by_what_it_is(name, kind):
    with pytest.raises(SpecError, match=f"backbone '{name}' cannot take prompts: it is a {kind}, "):
        load_backbone(name)


def test_blocks_and_attention_of_another_kind_are_refused_by_name():
    vit = make_vit()
    trunk_of(vit, "plain")
    vit.blocks[1].attn = nn.Identity()
    with pytest.raises(SpecError, match="backbone 'odd' cannot take prompts: its attention is Identity; "):
        trunk_of(vit, "odd")
    parallel = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, block_fn=_parallel_block())
    with pytest.raises(SpecError, match="its blocks are ParallelThingsBlock"):
        trunk_of(parallel, "odd")


def _parallel_block() -> type[nn.Module]:
    from timm.models.vision_transformer import ParallelThingsBlock

    return ParallelThingsBlock


def test_gated_attention_is_refused():
    vit = make_vit()
    vit.blocks[0].attn.gate = nn.Linear(WIDTH, WIDTH)
    with pytest.raises(SpecError, match="its attention is gated"):
        trunk_of(vit, "odd")


def test_a_loaded_backbone_is_frozen_and_described(toy_weights, state):
    backbone = load_backbone(TOY, weights=toy_weights)
    assert not any(module.training for module in backbone.vit.modules())
    assert not any(parameter.requires_grad for parameter in backbone.vit.parameters())
    identity = backbone.identity
    assert (identity.name, identity.depth, identity.width, identity.heads) == (TOY, 2, WIDTH, 2)
    assert (identity.patch_size, backbone.image_size) == (PATCH, SIDE)
    assert (backbone.mean, backbone.std, backbone.crop_ratio) == ((0.5,) * 3, (0.5,) * 3, 1.0)
    assert identity.sha256 == digest_tensors(state)


def assert_loads(path: Path, state: dict[str, Tensor]) -> None:
    loaded = load_backbone(TOY, weights=path).vit.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.items())


def test_weights_come_from_a_safetensors_file(toy_weights, state):
    assert_loads(toy_weights, state)


@pytest.mark.parametrize("wrapping", [None, "state_dict", "model", "teacher"])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ""])
def test_weights_come_from_a_torch_file(tmp_path, state, wrapping, suffix):
    path = tmp_path / f"weights{suffix}"
    torch.save(state if wrapping is None else {wrapping: state, "epoch": 3}, path)
    assert_loads(path, state)


def test_tensors_of_a_classifier_are_ignored(tmp_path, state):
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({**state, "head.weight": torch.ones(5, WIDTH), "head.bias": torch.ones(5)}, path)
    assert_loads(path, state)


def google_layout(vit: VisionTransformer) -> dict[str, np.ndarray[Any, Any]]:
    """Return a backbone's tensors under the names and in the shapes of Google's JAX checkpoints."""
    arrays = {
        "embedding/kernel": vit.patch_embed.proj.weight.permute(2, 3, 1, 0),
        "embedding/bias": vit.patch_embed.proj.bias,
        "cls": vit.cls_token,
        "Transformer/posembed_input/pos_embedding": vit.pos_embed,
        "Transformer/encoder_norm/scale": vit.norm.weight,
        "Transformer/encoder_norm/bias": vit.norm.bias,
    }
    for index, block in enumerate(vit.blocks):
        prefix = f"Transformer/encoderblock_{index}/"
        for norm, name in ((block.norm1, "LayerNorm_0"), (block.norm2, "LayerNorm_2")):
            arrays |= {f"{prefix}{name}/scale": norm.weight, f"{prefix}{name}/bias": norm.bias}
        heads, width = block.attn.num_heads, block.attn.head_dim
        attention = f"{prefix}MultiHeadDotProductAttention_1/"
        weights, biases = block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            arrays[f"{attention}{name}/kernel"] = weight.T.reshape(-1, heads, width)
            arrays[f"{attention}{name}/bias"] = bias.reshape(heads, width)
        arrays[f"{attention}out/kernel"] = block.attn.proj.weight.T.reshape(heads, width, -1)
        arrays[f"{attention}out/bias"] = block.attn.proj.bias
        for name, linear in (("Dense_0", block.mlp.fc1), ("Dense_1", block.mlp.fc2)):
            arrays[f"{prefix}MlpBlock_3/{name}/kernel"] = linear.weight.T
            arrays[f"{prefix}MlpBlock_3/{name}/bias"] = linear.bias
    return {name: value.detach().numpy() for name, value in arrays.items()}


def test_weights_come_from_an_npz_file_in_googles_layout(tmp_path, state):
    vit = timm.create_model(TOY, pretrained=False, num_classes=0)
    vit.load_state_dict(state)
    np.savez(tmp_path / "google.npz", **google_layout(vit))
    assert_loads(tmp_path / "google.npz", state)


@pytest.mark.parametrize("name", ["missing.safetensors", "missing.npz", "missing.pth"])
def test_a_missing_weights_file_is_named(tmp_path, name):
    with pytest.raises(SpecError, match=f"{name}: weights file not found"):
        load_backbone(TOY, weights=tmp_path / name)


def test_a_folder_is_no_weights_file(tmp_path):
    with pytest.raises(SpecError, match="is a folder, expected a weights file"):
        load_backbone(TOY, weights=tmp_path)


def test_weights_of_other_shapes_are_refused_with_the_tensor(tmp_path, state):
    path = tmp_path / "w.safetensors"
    state["blocks.1.mlp.fc1.weight"] = torch.zeros(3, WIDTH)
    safetensors.torch.save_file(state, path)
    with pytest.raises(SpecError, match=r"do not fit the architecture: .*blocks\.1\.mlp\.fc1\.weight"):
        load_backbone(TOY, weights=path)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_missing_and_foreign_tensors_are_refused_by_name(tmp_path, state, change):
    path = tmp_path / "w.safetensors"
    if change == "missing":
        del state["blocks.0.norm1.weight"]
    else:
        state["blocks.7.norm1.weight"] = torch.zeros(WIDTH)
    safetensors.torch.save_file(state, path)
    with pytest.raises(SpecError, match=r"do not fit the architecture: .*blocks\.[07]\.norm1\.weight"):
        load_backbone(TOY, weights=path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.npz", "w.pth"])
@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"not a checkpoint at all\n", b"PK\x03\x04 half an archive"])
def test_a_corrupt_file_is_refused_in_one_line_that_names_it(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SpecError, match=rf"{name}: (not a readable|cannot be read)") as caught:
        load_backbone(TOY, weights=tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_refused(tmp_path, toy_weights, state):
    torch.save(state, tmp_path / "whole.pth")
    for whole, name in ((toy_weights, "w.safetensors"), (tmp_path / "whole.pth", "w.pth")):
        content = whole.read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(SpecError, match=f"{name}: "):
            load_backbone(TOY, weights=tmp_path / name)


class _Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("form", ["torch zip", "torch legacy", "pickle", "npz"])
def test_a_file_of_pickled_objects_is_refused_without_running_it(tmp_path, state, form):
    target = tmp_path / "executed"
    content = {**state, "extra": _Payload(target)}
    path = tmp_path / ("w.npz" if form == "npz" else "w.pth")
    if form == "npz":
        np.savez(path, **{"embedding/kernel": np.array([_Payload(target)], dtype=object)})
    elif form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch zip")
    with pytest.raises(SpecError, match=rf"{path.name}: cannot be read"):
        load_backbone(TOY, weights=path)
    assert not target.exists()
    _Payload(target).__reduce__()[0](target)
    assert target.exists()


def write_cut(path: Path, state: dict[str, torch.Tensor], *, legacy: bool) -> int:
    """Write the first half of a file of tensors; return how long the whole was."""
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return len(content)


@pytest.mark.parametrize(("name", "legacy"), [("w.safetensors", False), ("w.pth", False), ("w.pth", True)])
def test_a_truncated_file_is_told_as_such_with_its_size(tmp_path, state, name, legacy):
    whole = write_cut(tmp_path / name, state, legacy=legacy)
    with pytest.raises(SpecError, match=f"it is truncated: {whole // 2} bytes found.*copy it again") as caught:
        load_backbone(TOY, weights=tmp_path / name)
    if name == "w.safetensors":
        assert f"{whole} expected" in str(caught.value)


@pytest.mark.parametrize("name", ["w.txt", "w.pth", "w.safetensors", "w.npz"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty, 0 bytes"),
        ("ünï 🌹\n".encode(), "it is text, not a weights file"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "it is a web page"),
        (b"<?xml version='1.0'?><Error>denied</Error>", "it is a web page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n",
            "it is a pointer of Git LFS, .*; run: git lfs pull",
        ),
    ],
    ids=["empty", "text", "page", "xml", "pointer"],
)
def test_what_is_no_weights_file_is_told_by_what_it_is(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SpecError, match=f"{name}: cannot be read as .*: {message}"):
        load_backbone(TOY, weights=tmp_path / name)


@pytest.mark.parametrize("legacy", [True, False])
def test_objects_in_a_weights_file_are_named_without_torchs_advice_to_unpickle_them(tmp_path, state, legacy):
    content = {"model": state, "args": argparse.Namespace(lr=1)}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(SpecError, match=r"other objects than tensors \(argparse\.Namespace\); only tensors") as caught:
        load_backbone(TOY, weights=tmp_path / "w.pth")
    assert "weights_only" not in str(caught.value)


def test_weights_of_another_model_are_told_by_three_tensors_of_each_kind_and_counts(tmp_path, state):
    wide = timm.create_model(TOY, pretrained=False, num_classes=0, embed_dim=2 * WIDTH)
    other = wide.state_dict()
    del other["norm.bias"]
    safetensors.torch.save_file({**other, "extra.one": torch.ones(2, 3)}, tmp_path / "w.safetensors")
    with pytest.raises(SpecError, match="do not fit the architecture") as caught:
        load_backbone(TOY, weights=tmp_path / "w.safetensors")
    message = str(caught.value)
    # All but the norm's bias differ.
    assert f"{len(state) - 1} tensors of another shape (cls_token [1, 1, {2 * WIDTH}], not [1, 1, {WIDTH}]" in message
    assert f"; 1 tensors missing (norm.bias [{WIDTH}]); 1 tensors too many (extra.one [2, 3])" in message
    assert message.count(", not [") == 3
    assert f": the file is of width {2 * WIDTH}, patch 4" in message


def test_weights_under_foreign_names_are_told_as_such(tmp_path):
    safetensors.torch.save_file({f"layer{index}.conv": torch.ones(1) for index in range(9)}, tmp_path / "w.safetensors")
    with pytest.raises(SpecError, match=r"9 tensors too many \(layer0\.conv \[1\], .*\.\.\.\): none of its names is"):
        load_backbone(TOY, weights=tmp_path / "w.safetensors")


def test_a_torch_file_of_something_else_is_refused(tmp_path):
    for number, content in enumerate([[1, 2], {"a": 3}, {"model": {"a": "b"}}, torch.zeros(3)]):
        path = tmp_path / f"{number}.pth"
        torch.save(content, path)
        with pytest.raises(SpecError, match="expected a state dict of tensors"):
            load_backbone(TOY, weights=path)


def test_an_archive_that_is_no_checkpoint_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("readme.txt", "nothing here")
    with pytest.raises(SpecError, match="cannot be read"):
        load_backbone(TOY, weights=tmp_path / "w.pth")


def test_pretrained_weights_that_cannot_be_had_are_asked_for_as_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    message = (
        r"weights of 'test_vit\.r160_in1k' are not in the local hub cache \(model\.safetensors of "
        r"timm/test_vit\.r160_in1k in .*cannot be reached: .*give a state dict with --weights FILE"
    )
    with pytest.raises(SpecError, match=message) as caught:
        load_backbone("test_vit.r160_in1k")
    assert "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch, tmp_path):
    asked: list[str] = []

    def refuse(url: str, **_: Any) -> None:
        asked.append(url)
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    with pytest.raises(SpecError, match="cannot be reached: no route; give"):
        load_backbone("test_vit.r160_in1k")
    assert asked == ["https://huggingface.co/timm/test_vit.r160_in1k/resolve/main/model.safetensors"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SpecError, match="HF_HUB_OFFLINE is set; give"):
        load_backbone("test_vit.r160_in1k")
    assert len(asked) == 1


def test_a_hub_that_answers_is_left_to_its_client(monkeypatch, tmp_path):
    def answer(url: str, **_: Any) -> None:
        return None

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", answer)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: 1 / 0)
    with pytest.raises(SpecError, match=r"cannot be downloaded \(division by zero\)"):
        load_backbone("test_vit.r160_in1k")


def test_weights_in_the_cache_are_taken_without_asking_whether_the_hub_is_there(monkeypatch):
    monkeypatch.setattr("vpdeploy_train.backbone.is_cached", lambda *_, **__: True)
    monkeypatch.setattr("vpdeploy_train.backbone.why_unreachable", None)
    state = timm.create_model("test_vit.r160_in1k", pretrained=False).state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(state))
    loaded = load_backbone("test_vit.r160_in1k").vit.state_dict()
    assert torch.equal(loaded["blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"])


def test_the_digest_is_independent_of_the_order_of_names(state):
    backwards = dict(reversed(list(state.items())))
    assert list(backwards) != list(state)
    assert digest_tensors(backwards) == digest_tensors(state)


def test_the_digest_changes_with_one_value_one_name_or_one_shape(state):
    digest = digest_tensors(state)
    assert len(digest) == 64
    value = {name: tensor.clone() for name, tensor in state.items()}
    last = value["norm.weight"]
    last[0] = torch.nextafter(last[0], torch.tensor(10.0))
    name = {("other" if key == "norm.bias" else key): tensor for key, tensor in state.items()}
    shape = {**state, "norm.bias": state["norm.bias"][None]}
    assert len({digest, *map(digest_tensors, (value, name, shape))}) == 4


def test_the_digest_is_independent_of_memory_layout_and_of_exact_storage_types(state):
    turned = {name: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor for name, tensor in state.items()}
    assert digest_tensors(turned) == digest_tensors(state)
    halves = {name: tensor.half() for name, tensor in state.items()}
    assert digest_tensors(halves) == digest_tensors({name: tensor.float() for name, tensor in halves.items()})


def test_another_image_size_interpolates_the_grid_of_positions(toy_weights, state):
    backbone = load_backbone(TOY, weights=toy_weights, image_size=2 * SIDE)
    assert backbone.image_size == 2 * SIDE
    positions = state["pos_embed"]
    grid = positions[:, 1:].reshape(1, 4, 4, WIDTH).permute(0, 3, 1, 2)
    larger = F.interpolate(grid, size=(8, 8), mode="bicubic", antialias=True)
    expected = torch.cat([positions[:, :1], larger.permute(0, 2, 3, 1).reshape(1, 64, WIDTH)], dim=1)
    assert torch.allclose(backbone.vit.pos_embed, expected, atol=1e-6)
    assert backbone.vit(random_pixels(1, side=2 * SIDE, dtype=torch.float32)).shape == (1, WIDTH)
    assert backbone.identity.sha256 != load_backbone(TOY, weights=toy_weights).identity.sha256


def test_an_image_size_that_patches_do_not_divide_is_refused(toy_weights):
    with pytest.raises(SpecError, match=f"--image-size 18 should be a multiple of 4, {TOY}'s patch"):
        load_backbone(TOY, weights=toy_weights, image_size=SIDE + 2)


def test_the_embedded_backbone_needs_no_file_and_no_network():
    backbone = load_backbone("vit_mini_patch8_64")
    assert (backbone.identity.depth, backbone.identity.width, backbone.image_size) == (6, 160, 64)


def test_timm_and_the_loader_agree_on_features(toy_weights, state):
    vit = randomise(timm.create_model(TOY, pretrained=False, num_classes=0), seed=5)
    vit.load_state_dict(state)
    pixels = random_pixels(2, dtype=torch.float32)
    assert torch.equal(load_backbone(TOY, weights=toy_weights).vit(pixels), vit(pixels))
    assert len(make_vit().blocks) == DEPTH
