"""DA-VPT: unit-length prompts, the metric loss written down sum by sum, and that it exists in training alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from train.toys import CLASSES, DEPTH, WIDTH, dimensions_of, features_with_tokens, make_model, make_vit, random_pixels

from vpdeploy_train.methods import METHODS, restore_method
from vpdeploy_train.methods.davpt import DAVPT, assign_classes, metric_loss

TOKENS = 4
LABELS = torch.tensor([0, 1, 2, 1])


def make(vit: torch.nn.Module, weight: float = 0.1) -> DAVPT:
    options = DAVPT.Options(prompt_tokens=TOKENS, davpt_weight=weight, prompt_dropout=0.0)
    return DAVPT.create(dimensions_of(vit), options, torch.Generator().manual_seed(1)).double()


def test_prompts_enter_at_unit_length():
    method = make(make_vit())
    for index in range(DEPTH):
        rows = method.prompts(index, None, None) if not method.training else method.rows(index)
        assert torch.allclose(rows.norm(dim=-1), torch.ones(TOKENS, dtype=torch.float64))
        assert torch.allclose(F.cosine_similarity(rows, method.visual[index]), torch.ones(TOKENS, dtype=torch.float64))


def test_the_model_equals_normalised_prompts_as_tokens():
    vit = make_vit().double()
    method = make(vit)
    pixels = random_pixels(3)
    rows = [each / each.norm(dim=-1, keepdim=True) for each in method.visual]
    expected = features_with_tokens(vit, pixels, rows, None)
    found = make_model(vit, method).features(pixels)
    assert float((found - expected).detach().abs().max()) < 1e-9 * float(expected.detach().abs().max())


def test_the_metric_loss_is_the_proxy_anchor_loss():
    source = torch.Generator().manual_seed(0)
    features = torch.randn(6, 8, generator=source, dtype=torch.float64)
    prompts = torch.randn(TOKENS, 8, generator=source, dtype=torch.float64)
    labels = torch.tensor([5, 2, 5, 0, 2, 0])
    centred = features - features.mean(0)

    def cosine(image: int, prompt: int) -> float:
        return float(F.cosine_similarity(centred[image], prompts[prompt], dim=0))

    classes = [0, 2, 5]
    means = [[sum(cosine(i, t) for i in range(6) if labels[i] == c) / 2 for t in range(TOKENS)] for c in classes]
    prompt_of = dict(zip(classes, assign_classes(torch.tensor(means, dtype=torch.float64)).tolist(), strict=True))
    near = far = 0.0
    for t in range(TOKENS):
        mine = [i for i in range(6) if prompt_of[int(labels[i])] == t]
        near += math.log(1 + sum(math.exp(-32 * (cosine(i, t) - 0.1)) for i in mine))
        far += math.log(1 + sum(math.exp(32 * (cosine(i, t) + 0.1)) for i in range(6) if i not in mine))
    expected = near / len({*prompt_of.values()}) + far / TOKENS
    assert float(metric_loss(features, prompts, labels)) == pytest.approx(expected, rel=1e-9)


def test_classes_go_to_similar_prompts_but_not_all_to_one():
    clear = torch.tensor([[0.9, 0.0, 0.1], [0.0, 0.1, 0.8], [0.1, 0.7, 0.0]])
    assert assign_classes(clear).tolist() == [0, 2, 1]
    crowded = torch.tensor([[0.9, 0.1], [0.9, 0.2], [0.9, 0.7], [0.9, 0.8]])
    assert assign_classes(crowded).tolist() == [0, 0, 1, 1]


def test_the_loss_is_asked_for_after_a_training_pass_alone():
    vit = make_vit().double()
    model = make_model(vit, make(vit))
    model(random_pixels(4))
    assert model.method.training_loss(LABELS) is None
    model.train()
    model(random_pixels(4))
    loss = model.method.training_loss(LABELS)
    assert loss is not None
    assert float(loss.detach()) > 0
    loss.backward()
    assert all(float(parameter.grad.abs().max()) > 0 for parameter in model.method.visual)
    assert model.method.training_loss(LABELS) is None


def test_without_a_weight_nothing_is_added():
    vit = make_vit().double()
    model = make_model(vit, make(vit, weight=0.0)).train()
    model(random_pixels(4))
    assert model.method.training_loss(LABELS) is None


def test_the_loss_is_finite_where_a_batch_has_one_image_or_one_class():
    vit = make_vit().double()
    model = make_model(vit, make(vit)).train()
    for labels in (LABELS[:1], LABELS[1:2].repeat(3)):
        model.zero_grad()
        model(random_pixels(len(labels)))
        loss = model.method.training_loss(labels)
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(parameter.grad).all() for parameter in model.method.visual)


def test_gradient_steps_on_the_loss_bring_prompts_to_their_classes():
    source = torch.Generator().manual_seed(3)
    labels = torch.arange(24) % CLASSES
    centres = torch.randn(CLASSES, WIDTH, generator=source)
    features = centres[labels] + 0.3 * torch.randn(24, WIDTH, generator=source)
    prompts = torch.randn(CLASSES, WIDTH, generator=source).requires_grad_()
    optimizer = torch.optim.Adam([prompts], lr=0.05)
    before = float(metric_loss(features, prompts.detach(), labels))
    for _ in range(100):
        optimizer.zero_grad()
        loss = metric_loss(features, prompts, labels)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5 * before
    nearest = (F.normalize(features - features.mean(0), dim=-1) @ F.normalize(prompts, dim=-1).T).argmax(1)
    assert len({(int(label), int(prompt)) for label, prompt in zip(labels, nearest, strict=True)}) == CLASSES


def test_other_methods_add_nothing_to_the_loss():
    assert [name for name in METHODS if "training_loss" in METHODS[name].__dict__] == ["da-vpt"]


def test_the_stored_structure_restores_the_method():
    method = make(make_vit())
    again = restore_method("da-vpt", method.dimensions, method.structure()).double()
    again.load_state_dict(method.state_dict(), strict=True)
    assert all(torch.equal(again.rows(index), method.rows(index)) for index in range(DEPTH))
