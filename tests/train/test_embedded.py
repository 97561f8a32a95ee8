"""The backbone in the wheel: loads without a network, is small, is repeatable, and has learned something."""

from __future__ import annotations

import socket

import numpy as np
import numpy.typing as npt
import pytest
import timm
import torch
from safetensors import safe_open
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch.nn import functional

from vpdeploy_train import embedded

TRAIN, TEST = 600, 400


def build(*, pretrained: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(embedded.NAME, pretrained=pretrained, num_classes=0).eval()


def read_digits() -> tuple[torch.Tensor, npt.NDArray[np.int64]]:
    digits = load_digits()
    rows = np.random.default_rng(0).permutation(len(digits.target))[: TRAIN + TEST]
    grey = torch.from_numpy(digits.images[rows]).float()[:, None] / 16
    images = functional.interpolate(grey, size=(64, 64), mode="bicubic", align_corners=False)
    return images.clamp(0, 1).mul(2).sub(1).expand(-1, 3, -1, -1), digits.target[rows]


def probe_digits(model: torch.nn.Module) -> float:
    images, labels = read_digits()
    with torch.inference_mode():
        features = torch.cat([model(batch) for batch in images.split(200)]).numpy()
    features = StandardScaler().fit(features[:TRAIN]).transform(features)
    classifier = LogisticRegression(C=0.1, max_iter=1000).fit(features[:TRAIN], labels[:TRAIN])
    return float(classifier.score(features[TRAIN:], labels[TRAIN:]))


def test_loads_with_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the embedded backbone asked for a network connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model = build(pretrained=True)
    with safe_open(embedded.WEIGHTS, framework="pt") as stored:
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, stored.get_tensor(name).float()), name


def test_file_fits_into_the_wheel_as_float16() -> None:
    assert embedded.WEIGHTS.stat().st_size <= 4_000_000
    with safe_open(embedded.WEIGHTS, framework="pt") as stored:
        assert {stored.get_tensor(name).dtype for name in stored.keys()} == {torch.float16}  # noqa: SIM118


def test_architecture_is_the_documented_one() -> None:
    model = build(pretrained=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["pos_embed"] == (1, 65, 160)
    assert shapes["patch_embed.proj.weight"] == (160, 3, 8, 8)
    assert shapes["blocks.5.mlp.fc1.weight"] == (640, 160)
    assert "blocks.6.norm1.weight" not in shapes
    assert model.blocks[0].attn.num_heads == 5
    # patch 30,880 + positions 10,400 + class token 160 + 6 blocks of 309,280 + final norm 320
    assert sum(np.prod(shape) for shape in shapes.values()) == 1_897_440


def test_data_config_scales_images_to_minus_one_to_one() -> None:
    config = timm.data.resolve_data_config({}, model=build(pretrained=False))
    assert config["input_size"] == (3, 64, 64)
    assert tuple(config["mean"]) == tuple(config["std"]) == (0.5, 0.5, 0.5)


def test_two_loads_give_identical_features() -> None:
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.inference_mode():
        first, second = build(pretrained=True)(images), build(pretrained=True)(images)
    assert first.shape == (4, 160)
    assert torch.equal(first, second)
    assert torch.isfinite(first).all()


def test_a_head_can_be_asked_for() -> None:
    model = timm.create_model(embedded.NAME, pretrained=True, num_classes=7)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_missing_weights_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "WEIGHTS", embedded.WEIGHTS.with_name("gone.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"expected the embedded weights at .*gone.*reinstall"):
        build(pretrained=True)


def test_features_separate_digits_better_than_random_ones() -> None:
    assert probe_digits(build(pretrained=True)) > probe_digits(build(pretrained=False)) + 0.1
