"""VFPT: the Fourier transform written down term by term, pruning, and what a run stores."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from train.toys import DEPTH, WIDTH, dimensions_of, features_with_tokens, make_model, make_vit, random_pixels

from vpdeploy_train.methods import restore_method
from vpdeploy_train.methods.kept import SEGMENTS, Kept
from vpdeploy_train.methods.vfpt import VFPT

TOKENS, FOURIER = 5, 3


def make(vit: torch.nn.Module, share: float = 0.6) -> VFPT:
    options = VFPT.Options(prompt_tokens=TOKENS, vfpt_share=share)
    return VFPT.create(dimensions_of(vit), options, torch.Generator().manual_seed(1)).double().eval()


def transformed(rows: Tensor) -> Tensor:
    """The real part of the two-dimensional discrete Fourier transform, by its definition."""
    tokens, width = rows.shape
    token_angles = torch.outer(torch.arange(tokens), torch.arange(tokens)).double() * 2 * math.pi / tokens
    channel_angles = torch.outer(torch.arange(width), torch.arange(width)).double() * 2 * math.pi / width
    even = token_angles.cos() @ rows @ channel_angles.cos()
    return even - token_angles.sin() @ rows @ channel_angles.sin()


def kept_of(*blocks: tuple[int, ...]) -> Kept:
    segments = tuple(((True,) * SEGMENTS,) * len(block) for block in blocks)
    return Kept(tokens=blocks, kv_tokens=((),) * len(blocks), segments=segments)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.6, FOURIER), (1.0, TOKENS)])
def test_the_first_prompts_are_transformed_and_the_others_stay(share, count):
    vit = make_vit().double()
    method = make(vit, share)
    for index in range(DEPTH):
        stored = method.visual[index].detach()
        expected = torch.cat([transformed(stored[:count]), stored[count:]])
        assert torch.allclose(method.rows(index), expected, rtol=0, atol=1e-12)


def test_the_model_equals_transformed_prompts_as_tokens():
    vit = make_vit().double()
    method = make(vit)
    pixels = random_pixels(3)
    rows = [torch.cat([transformed(each[:FOURIER]), each[FOURIER:]]) for each in method.visual]
    expected = features_with_tokens(vit, pixels, rows, None)
    found = make_model(vit, method).features(pixels)
    assert float((found - expected).detach().abs().max()) < 1e-9 * float(expected.detach().abs().max())


def test_pruning_transforms_the_first_prompts_that_are_left():
    vit = make_vit().double()
    method = make(vit)
    kept = kept_of((0, 2, 4), (3, 4), (1,))
    smaller = method.pruned_to(kept, method.state_dict()).double().eval()
    for index, (block, count) in enumerate(zip(kept.tokens, (2, 0, 1), strict=True)):
        stored = method.visual[index][list(block)].detach()
        expected = torch.cat([transformed(stored[:count]), stored[count:]])
        assert torch.allclose(smaller.rows(index), expected, rtol=0, atol=1e-12)


def test_the_stored_structure_restores_the_method():
    vit = make_vit().double()
    method = make(vit)
    method = method.pruned_to(kept_of((0, 2, 4), (3, 4), (1,)), method.state_dict()).double()
    again = restore_method("vfpt", method.dimensions, method.structure()).double()
    again.load_state_dict(method.state_dict(), strict=True)
    for index in range(DEPTH):
        assert torch.equal(again.rows(index), method.rows(index))


def test_it_has_the_parameters_of_vpt_deep():
    assert make(make_vit()).summary()["parameters"] == DEPTH * TOKENS * WIDTH
