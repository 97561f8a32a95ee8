import tracemalloc

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

from vpdeploy_train import discriminant
from vpdeploy_train.head import fit_head
from vpdeploy_train.methods.method import NoPrompts
from vpdeploy_train.prompted import PromptedViT


class Identity(PromptedViT):
    """A model whose features are its input."""

    def __init__(self, width: int, classes: int) -> None:
        nn.Module.__init__(self)
        self.vit, self.method, self.head = nn.Identity(), NoPrompts(), nn.Linear(width, classes)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels


@pytest.mark.parametrize("classes", [2, 3])
def test_the_head_gives_the_probabilities_of_logistic_regression_on_standardised_features(classes):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, 60)
    features = (rng.normal(3.0, 2.0, (60, 5)) + labels[:, None] * [1.0, -0.5, 0.0, 2.0, 0.3]).astype(np.float32)
    model = Identity(5, classes)
    halves = [slice(0, 40), slice(40, 60)]
    fit_head(model, [(torch.from_numpy(features[half]), torch.from_numpy(labels[half])) for half in halves])
    scaler = StandardScaler().fit(features.astype(np.float64))
    reference = LogisticRegression(C=0.1, max_iter=1000).fit(scaler.transform(features), labels)
    with torch.no_grad():
        found = model(torch.from_numpy(features)).softmax(1).numpy()
    np.testing.assert_allclose(found, reference.predict_proba(scaler.transform(features)), atol=2e-5)


@pytest.mark.parametrize("present", [(0, 2), (0, 2, 3)])
def test_a_class_without_images_is_never_predicted_and_changes_nothing_for_the_others(present):
    rng = np.random.default_rng(1)
    labels = rng.choice(present, 60)
    features = torch.from_numpy(rng.normal(0.0, 1.0, (60, 5)).astype(np.float32) + labels[:, None].astype(np.float32))
    whole, dense = Identity(5, 5), Identity(5, len(present))
    fit_head(whole, [(features, torch.from_numpy(labels))])
    fit_head(dense, [(features, torch.from_numpy(np.searchsorted(present, labels)))])
    with torch.no_grad():
        logits, expected = whole(features), dense(features)
    torch.testing.assert_close(logits[:, list(present)], expected)
    assert set(logits.argmax(1).tolist()) <= set(present)


def test_a_probe_of_many_images_and_classes_takes_no_memory_of_their_product():
    images, classes, width = 20_000, 4_000, 8
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), images // classes)
    centres = rng.normal(0.0, 30.0, (classes, width))
    features = torch.from_numpy((centres[labels] + rng.normal(0.0, 1.0, (images, width))).astype(np.float32))
    model = Identity(width, classes)
    tracemalloc.start()
    try:
        fit_head(model, [(features, torch.from_numpy(labels))])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < images * classes  # a byte for each score; one float64 array of them would be eight times that
    with torch.no_grad():
        right = (model(features[::50]).argmax(1) == torch.from_numpy(labels[::50])).float().mean()
    assert right > 0.95


def test_linear_discriminant_analysis_is_that_of_the_textbook(monkeypatch):
    monkeypatch.setattr(discriminant, "_CHUNK", 7)  # several chunks, the last one smaller
    rng = np.random.default_rng(2)
    labels = rng.choice([1, 2, 5], 60)
    features = (rng.normal(3.0, [1.0, 5.0, 0.2, 2.0], (60, 4)) + labels[:, None]).astype(np.float32)
    features[:, 3] = 4.0  # a feature that never changes
    found = discriminant.fit_discriminant(features, labels)

    scale = np.where(features.std(0) > 0, features.std(0, dtype=np.float64), 1.0)
    standard = (features - features.mean(0, dtype=np.float64)) / scale
    means = np.stack([standard[labels == label].mean(0) for label in (1, 2, 5)])
    within = sum(
        np.outer(row - mean, row - mean)
        for label, mean in zip((1, 2, 5), means, strict=True)
        for row in standard[labels == label]
    )
    inverse = np.linalg.inv(0.97 * within / (60 - 3) + 0.03 * np.eye(4))
    expected = [
        standard @ inverse @ mean - mean @ inverse @ mean / 2 + np.log((labels == label).mean())
        for label, mean in zip((1, 2, 5), means, strict=True)
    ]
    assert found.classes.tolist() == [1, 2, 5]
    scores, textbook = features @ found.weight.T + found.bias, np.stack(expected, axis=1)
    sharpness = np.abs(scores).max() / np.abs(textbook).max()
    np.testing.assert_allclose(scores, sharpness * textbook, rtol=1e-4, atol=1e-4)

    # One factor for all logits, better than its neighbours by the objective of logistic regression with C = 0.1.
    columns = [{1: 0, 2: 1, 5: 2}[label] for label in labels.tolist()]
    weights = means @ inverse

    def objective(factor: float) -> float:
        losses = np.log(np.exp(factor * textbook).sum(1)) - factor * textbook[np.arange(60), columns]
        return losses.sum() + np.square(factor * weights).sum() / (2 * 0.1)

    assert 0 < sharpness <= 1
    assert objective(sharpness) <= min(objective(sharpness * 2**0.5), objective(sharpness / 2**0.5))


def test_images_that_are_all_alike_within_their_class_are_told_apart():
    features = np.repeat(np.eye(3, 4, dtype=np.float32), 2, axis=0)
    found = discriminant.fit_discriminant(features, np.repeat(np.arange(3), 2))
    assert np.abs(features @ found.weight.T + found.bias).max() < 30  # training could not unlearn logits of thousands
    assert (features @ found.weight.T + found.bias).argmax(1).tolist() == [0, 0, 1, 1, 2, 2]
