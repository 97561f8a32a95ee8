from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tiny_runs
import torch

from benchmarks.tokens import TokenPromptedViT
from vpdeploy_train.methods.e2vpt import E2VPT
from vpdeploy_train.methods.kept import Kept
from vpdeploy_train.prompted import PromptedViT

MakePixels = Callable[..., np.ndarray]


def model_of(kept: Kept) -> tuple[PromptedViT, E2VPT]:
    vit = tiny_runs.randomise(tiny_runs.vit_fixture_patch8_32(), seed=0)
    method = tiny_runs.e2vpt(tiny_runs.dimensions_of(vit), kept)
    return tiny_runs.prompted(vit, method, 5), method


def test_prompts_as_tokens_give_what_prompts_as_a_prefix_give():
    model, method = model_of(Kept.everything(tiny_runs.DEPTH, 6, 0))
    as_tokens = TokenPromptedViT(model.vit, [method.rows(index) for index in range(3)], model.head)
    image = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = as_tokens(image), model(image)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_without_prompts_it_is_the_plain_model():
    model, _ = model_of(Kept.everything(tiny_runs.DEPTH, 0, 0))
    plain = TokenPromptedViT(model.vit, None, model.head)
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        np.testing.assert_allclose(plain(image).numpy(), model.head(model.vit(image)).numpy(), rtol=1e-6, atol=1e-6)
