"""Class weights and label smoothing: in the training loss, in the probe, and nowhere else."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_class_weight
from train.test_start import history, train
from train.toys import TOY, make_vit

from vpdeploy.errors import SpecError
from vpdeploy_train.discriminant import fit_discriminant
from vpdeploy_train.head import fit_head
from vpdeploy_train.methods.method import NoPrompts
from vpdeploy_train.objective import Objective, class_weights
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.settings import TrainSettings


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plot_curves", "plot_pruning"):
        monkeypatch.setattr(f"vpdeploy_train.training.{name}", lambda _, path: path.touch())


@pytest.fixture
def settings(colours: Path, toy_weights: Path) -> TrainSettings:
    for number in range(4, 14):
        (colours / "red" / f"{number:02}.png").unlink(missing_ok=True)
    return TrainSettings.of(
        data=str(colours),
        backbone=TOY,
        weights=str(toy_weights),
        epochs=1,
        batch_size=64,
        device="cpu",
        prune=False,
        lr=1e-30,
        prompt_dropout=0.0,
        prompt_tokens=2,
        kv_tokens=1,
    )


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    from train.toys import write_colours

    return write_colours(tmp_path / "colours")


def test_balanced_weights_are_scikit_learns():
    labels = [0] * 6 + [2] * 3 + [3]
    weights = class_weights("balanced", labels, 5)
    assert weights is not None
    expected = compute_class_weight("balanced", classes=np.array([0, 2, 3]), y=labels)
    assert weights[[0, 2, 3]].tolist() == pytest.approx(expected.tolist())
    assert weights[[1, 4]].tolist() == [0.0, 0.0]
    assert class_weights("none", labels, 5) is None


def test_the_loss_weighs_classes_and_smooths_labels():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    logarithms = [2 - math.log(math.exp(2) + 2), 1 - math.log(math.exp(1) + 2)]
    weights = torch.tensor([0.5, 2.0, 1.0])
    weighed = Objective(weights=weights)(logits, torch.tensor([0, 1]))
    assert float(weighed) == pytest.approx(-(0.5 * logarithms[0] + 2 * logarithms[1]) / 2.5)
    smooth = Objective(smoothing=0.3)(logits[:1], torch.tensor([0]))
    assert float(smooth) == pytest.approx(-(0.8 * logarithms[0] + 0.2 * (logarithms[0] - 2)), rel=1e-6)


def test_a_rare_class_does_not_draw_the_smoothed_images_of_others_towards_itself():
    logits = torch.tensor([[2.0, 0.0, -3.0], [0.0, 1.0, -2.0]])
    labels = torch.tensor([0, 1])
    alike, rare = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 40.0])
    losses = [float(Objective(weights=each, smoothing=0.3)(logits, labels)) for each in (None, alike, rare)]
    assert losses == pytest.approx([losses[0]] * 3)


def test_training_loss_has_them_and_validation_loss_has_not(settings, tmp_path):
    asked = {"plain": {}, "weights": {"class_weights": "balanced"}, "smoothing": {"label_smoothing": 0.5}}
    rows = {}
    for name, change in asked.items():
        train(replace(settings, head="zero", **change), tmp_path / name)
        rows[name] = history(tmp_path / name)[1]
    assert len({row["train_loss"] for row in rows.values()}) == 3
    assert len({row["val_loss"] for row in rows.values()}) == 1


def test_the_probe_weighs_classes():
    vit = make_vit()
    model = PromptedViT(vit, NoPrompts(), 3)
    torch.manual_seed(1)
    pixels = torch.randn(40, 3, 16, 16)
    labels = torch.tensor([0] * 30 + [1] * 6 + [2] * 4)
    fit_head(model, [(pixels, labels)], class_weights="balanced")
    with torch.no_grad():
        features = model.features(pixels).numpy().astype(np.float64)
        scaler = StandardScaler().fit(features)
        reference = LogisticRegression(C=0.1, max_iter=1000, class_weight="balanced")
        expected = reference.fit(scaler.transform(features), labels.numpy()).predict_proba(scaler.transform(features))
        found = model.head(torch.from_numpy(features).float()).softmax(1).numpy()
    assert found == pytest.approx(expected, abs=1e-3)


def test_the_large_probe_takes_classes_for_equally_likely():
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1], [90, 10])
    features = (random.normal(size=(100, 4)) + labels[:, None]).astype(np.float32)
    middle = (features[labels == 0].mean(0) + features[labels == 1].mean(0)) / 2
    plain, balanced = (fit_discriminant(features, labels, balanced=each) for each in (False, True))
    leaning = [float((each.weight @ middle + each.bias) @ [1, -1]) for each in (plain, balanced)]
    assert leaning[0] > 0.5
    assert leaning[1] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("change", [{"label_smoothing": 1.0}, {"label_smoothing": -0.1}, {"class_weights": "sqrt"}])
def test_what_is_no_weighting_is_refused(change):
    with pytest.raises(SpecError, match=r"--label-smoothing|--class-weights"):
        TrainSettings.of(data="digits", **change)
