from __future__ import annotations

import pytest

from vpdeploy_train.cost import ViTShape, macs_as_prefix, macs_as_tokens

VIT_B = ViTShape(depth=12, width=768, hidden=3072, tokens=197, patch_values=768, classes=1000)
plain = macs_as_tokens(VIT_B, 0)


def test_a_plain_model_costs_what_the_products_of_its_layers_cost():
    tiny = ViTShape(depth=1, width=4, hidden=8, tokens=3, patch_values=12, classes=5)
    embedding, head = 2 * 12 * 4, 4 * 5
    projections, attention, mlp = 4 * 3 * 4 * 4, 2 * 3 * 3 * 4, 2 * 3 * 4 * 8
    assert macs_as_tokens(tiny, 0) == embedding + projections + attention + mlp + head


def test_the_plain_vit_b_costs_17_6_giga():
    assert plain / 1e9 == pytest.approx(17.56, abs=0.01)


@pytest.mark.parametrize(
    ("prompts", "as_tokens", "as_prefix", "class_token_only"),
    [(10, 0.053, 0.002, -0.067), (50, 0.265, 0.010, -0.060), (100, 0.535, 0.021, -0.050)],
)
def test_the_figures_of_prompts_on_vit_b(prompts: int, as_tokens: float, as_prefix: float, class_token_only: float):
    lengths = [prompts] * 12
    assert macs_as_tokens(VIT_B, prompts) / plain - 1 == pytest.approx(as_tokens, abs=0.001)
    assert macs_as_prefix(VIT_B, lengths, class_token_only=False) / plain - 1 == pytest.approx(as_prefix, abs=0.001)
    assert macs_as_prefix(VIT_B, lengths) / plain - 1 == pytest.approx(class_token_only, abs=0.001)


def test_without_prompts_a_prefix_costs_nothing():
    assert macs_as_prefix(VIT_B, [0] * 12, class_token_only=False) == plain


def test_every_column_of_a_prefix_costs_two_products_with_each_query():
    longer = [4] + [3] * 11
    assert macs_as_prefix(VIT_B, longer) - macs_as_prefix(VIT_B, [3] * 12) == 2 * 197 * 768
