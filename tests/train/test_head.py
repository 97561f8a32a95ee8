import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

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
