"""A prefix of keys and values is the same function as prompts that run as tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from train.toys import (
    CLASSES,
    DEPTH,
    HEADS,
    SIDE,
    WIDTH,
    block_with_extra_keys,
    dimensions_of,
    features_with_prefixes,
    features_with_tokens,
    make_method,
    make_model,
    make_vit,
    random_pixels,
    random_segments,
    randomise,
    segment_factors,
)

from vpdeploy_export.compilation import compile_prompts
from vpdeploy_train.methods.e2vpt import E2VPT
from vpdeploy_train.methods.kept import SEGMENTS, Kept
from vpdeploy_train.methods.method import NoPrompts
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.trunks import Prefix, trunk_of
from vpdeploy_train.trunks.attention import attend

EXACT = 1e-9
"""Relative error that float64 leaves to equal functions of a different order of operations."""

PLAIN: dict[str, dict[str, Any]] = {
    "token pooling": {},
    "average pooling": {"global_pool": "avg"},
    "average pooling without a class token": {"global_pool": "avg", "class_token": False},
    "attention pooling": {"global_pool": "map", "class_token": False},
    "pooling by a probe": {"global_pool": "prr"},
    "maximum pooling": {"global_pool": "max"},
    "registers": {"reg_tokens": 3},
    "registers and average pooling": {"reg_tokens": 2, "global_pool": "avg"},
    "class token without a position": {"no_embed_class": True},
    "registers without a position": {"no_embed_class": True, "reg_tokens": 4},
    "layer scale": {"init_values": 0.1},
    "QK norm": {"qk_norm": True},
    "norm before the blocks": {"pre_norm": True},
    "norm inside the attention": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "no bias in the projections": {"qkv_bias": False},
    "no positions": {"pos_embed": "none"},
}

NAMED = ("test_vit", "test_vit2", "test_vit3", "vit_tiny_patch16_224", "vit_wee_patch16_reg1_gap_256")


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest error relative to the largest expected value."""
    assert found.shape == expected.shape
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN.keys())
def test_without_prompts_the_features_are_timms_own(options):
    vit = make_vit(**options)
    pixels = random_pixels(3, dtype=torch.float32)
    with torch.no_grad():
        assert difference(PromptedViT(vit, NoPrompts(), CLASSES).features(pixels), vit(pixels)) < 1e-5


@pytest.mark.parametrize("name", NAMED)
def test_without_prompts_a_named_backbone_gives_timms_own_features(name):
    torch.manual_seed(0)
    vit = randomise(timm.create_model(name, pretrained=False, num_classes=0, img_size=32))
    pixels = random_pixels(2, side=32, dtype=torch.float32)
    with torch.no_grad():
        assert difference(PromptedViT(vit, NoPrompts(), CLASSES).features(pixels), vit(pixels)) < 1e-5


@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN.keys())
def test_a_prefix_without_columns_is_no_prompts(options):
    vit = make_vit(**options).double()
    empty = make_model(vit, make_method(vit, 0, 0))
    pixels = random_pixels(2)
    assert torch.equal(empty.features(pixels), make_model(vit, NoPrompts()).features(pixels))


def test_the_reference_block_is_timms_block_where_there_are_no_extra_keys():
    vit = make_vit(init_values=0.3, qk_norm=True).double()
    tokens = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    none = torch.zeros(HEADS, 0, WIDTH // HEADS, dtype=torch.float64)
    for block in vit.blocks:
        assert difference(block_with_extra_keys(block, tokens, none, none), block(tokens)) < EXACT


def reference(model: PromptedViT, pixels: Tensor, factors: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
    """Run copies of a model's prompts as tokens; return logits and the copies in the order of its parameters."""
    method = model.method
    assert isinstance(method, E2VPT)
    leaves = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    visual = [leaves[f"method.visual.{index}"] for index in range(len(model.vit.blocks))]
    masked = visual if factors is None else [row * factor for row, factor in zip(visual, factors, strict=True)]
    values = "kv" if method.kv_shared else "kv_value"
    kv = [(leaves[f"method.kv.{index}"], leaves[f"method.{values}.{index}"]) for index in range(len(model.vit.blocks))]
    features = features_with_tokens(model.vit, pixels, masked, None if kv[0][0].shape[1] == 0 else kv)
    logits = F.linear(features, leaves["head.weight"], leaves["head.bias"])
    return logits, [leaves[name] for name, parameter in model.named_parameters() if parameter.requires_grad]


def assert_same_function(model: PromptedViT, factors: list[Tensor] | None = None, side: int = SIDE) -> None:
    """Compare logits and every gradient with prompts as tokens."""
    pixels, labels = random_pixels(4, side=side), torch.tensor([0, 1, 2, 1])
    expected, leaves = reference(model, pixels, factors)
    found = model(pixels)
    assert difference(found, expected) < EXACT
    model.zero_grad()
    F.cross_entropy(found, labels).backward()
    F.cross_entropy(expected, labels).backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    compared = [(mine, theirs) for mine, theirs in zip(trained, leaves, strict=True) if mine.numel()]
    assert len(compared) >= 3
    for mine, theirs in compared:
        assert float(theirs.grad.abs().max()) > 0
        assert difference(mine.grad, theirs.grad) < EXACT


@pytest.mark.parametrize("options", [options for options in PLAIN.values() if options.get("class_token", True)])
def test_visual_prompts_equal_tokens_in_logits_and_gradients(options):
    vit = make_vit(**options).double()
    assert_same_function(make_model(vit, make_method(vit, 5, 0)))


@pytest.mark.parametrize("kv_shared", [True, False])
@pytest.mark.parametrize(("tokens", "kv_tokens"), [(5, 4), (0, 4), (1, 1)])
@pytest.mark.parametrize("options", [{}, {"global_pool": "avg", "init_values": 0.3, "reg_tokens": 2}])
def test_key_value_prompts_equal_their_concatenation_in_logits_and_gradients(options, tokens, kv_tokens, kv_shared):
    vit = make_vit(**options).double()
    assert_same_function(make_model(vit, make_method(vit, tokens, kv_tokens, kv_shared=kv_shared)))


def test_a_named_backbone_with_prompts_equals_tokens():
    torch.manual_seed(0)
    vit = randomise(timm.create_model("test_vit2", pretrained=False, num_classes=0, img_size=32)).double()
    assert_same_function(make_model(vit, make_method(vit, 3, 2)), side=32)


@pytest.mark.parametrize("order", ["contiguous", "strided"])
@pytest.mark.parametrize("kv_tokens", [0, 3])
def test_segment_masks_equal_zeroed_channels_of_tokens(order, kv_tokens):
    vit = make_vit().double()
    segments = random_segments(5)
    factors = [segment_factors(block, WIDTH, order) for block in segments]
    assert {0.0, 1.0} == set(torch.cat(factors).unique().tolist())
    model = make_model(vit, make_method(vit, 5, kv_tokens, segments=segments, segment_order=order))
    assert_same_function(model, factors)
    for index, factor in enumerate(factors):
        assert (model.method.visual[index].grad[factor == 0] == 0).all()


def test_the_two_segment_orders_are_different_functions():
    vit = make_vit().double()
    segments = random_segments(5)
    contiguous, strided = (
        make_model(vit, make_method(vit, 5, 0, segments=segments, segment_order=order))
        for order in ("contiguous", "strided")
    )
    pixels = random_pixels(2)
    assert difference(contiguous.features(pixels), strided.features(pixels)) > 1e-3


@pytest.mark.parametrize("kv_shared", [True, False])
def test_removed_prompts_equal_a_run_with_fewer_tokens(kv_shared):
    vit = make_vit().double()
    method = make_method(vit, 6, 4, kv_shared=kv_shared).double()
    tokens, kv_tokens = ((0, 3, 5), (2,), (1, 2, 3, 4)), ((1, 3), (0,), (0, 1, 3))
    kept = Kept(
        tokens=tokens, kv_tokens=kv_tokens, segments=tuple(((True,) * SEGMENTS,) * len(block) for block in tokens)
    )
    pixels = random_pixels(3)
    found = make_model(vit, method.pruned_to(kept, method.state_dict())).features(pixels)
    values = method.kv if kv_shared else method.kv_value
    expected = features_with_tokens(
        vit,
        pixels,
        [method.visual[index][list(block)] for index, block in enumerate(tokens)],
        [(method.kv[index][:, list(block)], values[index][:, list(block)]) for index, block in enumerate(kv_tokens)],
    )
    assert difference(found, expected) < EXACT


def test_a_zeroed_token_is_not_a_removed_one():
    vit = make_vit().double()
    pixels = random_pixels(3)
    prompts = [row.double() for row in make_method(vit, 4, 0).visual]
    zeroed = [torch.cat([row[:2], torch.zeros_like(row[2:])]) for row in prompts]
    removed = [row[:2] for row in prompts]
    with_zeros = features_with_tokens(vit, pixels, zeroed)
    assert difference(with_zeros, features_with_tokens(vit, pixels, removed)) > 1e-3
    method = make_method(vit, 4, 0)
    method.load_state_dict({f"visual.{index}": row for index, row in enumerate(zeroed)}, strict=False)
    assert difference(make_model(vit, method).features(pixels), with_zeros) < EXACT


def test_the_first_row_alone_equals_the_first_row_of_all():
    vit = make_vit(qk_norm=True, init_values=0.3).double()
    tokens = torch.randn(2, 7, WIDTH, dtype=torch.float64)
    key, value = torch.randn(2, HEADS, 3, WIDTH // HEADS, dtype=torch.float64)
    prefix = Prefix(key=key, value=value, bias=torch.tensor([0.0, -1.0, 2.0], dtype=torch.float64))
    trunk = trunk_of(vit)
    for index in range(len(vit.blocks)):
        everything = trunk.run(index, tokens, prefix)
        assert difference(trunk.run(index, tokens, prefix, first_row_only=True), everything[:, :1]) < EXACT


@pytest.mark.parametrize("per_image", [False, True])
def test_the_bias_is_added_to_the_scaled_logits(per_image):
    source = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, HEADS, 5, 8, generator=source, dtype=torch.float64)
    lead = (2,) if per_image else ()
    extra_key, extra_value = torch.randn(2, *lead, HEADS, 4, 8, generator=source, dtype=torch.float64)
    bias = torch.randn(*lead, 4, generator=source, dtype=torch.float64)
    found = attend(query, key, value, Prefix(key=extra_key, value=extra_value, bias=bias))
    for image in range(2):
        for head in range(HEADS):
            mine = (extra_key[image], extra_value[image], bias[image]) if per_image else (extra_key, extra_value, bias)
            for row in range(5):
                q = query[image, head, row]
                logits = [float(q @ k) / math.sqrt(8) + float(b) for k, b in zip(mine[0][head], mine[2], strict=True)]
                logits += [float(q @ k) / math.sqrt(8) for k in key[image, head]]
                total = sum(math.exp(logit) for logit in logits)
                values = [*mine[1][head], *value[image, head]]
                expected = sum(math.exp(a) / total * v for a, v in zip(logits, values, strict=True))
                assert difference(found[image, head, row], expected) < EXACT


@pytest.mark.parametrize(("zeros", "others", "kv_tokens"), [(2, 0, 0), (3, 4, 0), (7, 6, 5), (29, 1, 2)])
def test_zero_tokens_merge_into_one_column_with_the_logarithm_of_their_number(zeros, others, kv_tokens):
    vit = make_vit().double()
    method = make_method(vit, zeros + others, kv_tokens)
    with torch.no_grad():
        for block in range(DEPTH):
            method.visual[block][torch.randperm(zeros + others)[:zeros]] = 0
    model = make_model(vit, method)
    merged = compile_prompts(model).blocks
    for prefix in merged:
        assert prefix.key.shape == prefix.value.shape == (HEADS, kv_tokens + others + 1, WIDTH // HEADS)
        expected = [0.0] * (kv_tokens + others) + [math.log(zeros)]
        assert sorted(prefix.bias.tolist()) == pytest.approx(expected, rel=1e-14)
    pixels = random_pixels(3)
    found = features_with_prefixes(vit, pixels, merged)
    expected_features = features_with_tokens(
        vit,
        pixels,
        [row.detach() for row in method.visual],
        [(row.detach(), row.detach()) for row in method.kv],
    )
    assert difference(found, expected_features) < EXACT


@pytest.mark.parametrize("kv_tokens", [1, 4])
def test_equal_key_value_prompts_merge_into_one_column_with_the_logarithm_of_their_number(kv_tokens):
    vit = make_vit().double()
    method = make_method(vit, 2, kv_tokens)
    with torch.no_grad():
        for block in range(DEPTH):
            method.kv[block][:] = method.kv[block][:, :1].clone()
    model = make_model(vit, method)
    merged = compile_prompts(model).blocks
    for prefix in merged:
        assert prefix.key.shape == prefix.value.shape == (HEADS, 3, WIDTH // HEADS)
        assert prefix.bias.tolist() == pytest.approx([math.log(kv_tokens), 0, 0], rel=1e-14)
    pixels = random_pixels(3)
    with torch.no_grad():
        expected = model.features(pixels)
    assert difference(features_with_prefixes(vit, pixels, merged), expected) < EXACT


def test_equal_prompts_of_different_blocks_stay_apart():
    vit = make_vit().double()
    method = make_method(vit, 2, 1)
    with torch.no_grad():
        for block in range(DEPTH):
            method.visual[block][:] = method.visual[0].clone()
    for prefix in compile_prompts(make_model(vit, method)).blocks:
        assert prefix.bias.tolist() == [0, 0, 0]


def test_compiling_leaves_the_model_as_it_was():
    vit = make_vit()
    model = PromptedViT(vit, make_method(vit, 3, 2), CLASSES)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compile_prompts(model)
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])


def projected_inputs(model: PromptedViT, pixels: Tensor, tokens: int) -> list[Tensor]:
    """Return what each block's norm saw of the prompts in one forward pass."""
    seen: list[Tensor] = []

    def note(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].dim() == 2:
            assert inputs[0].shape == (tokens, WIDTH)
            seen.append(inputs[0].detach().clone())

    handles = [block.norm1.register_forward_pre_hook(note) for block in model.vit.blocks]
    model.features(pixels)
    for handle in handles:
        handle.remove()
    return seen


def test_dropout_zeroes_prompts_and_scales_the_rest_only_while_training():
    vit = make_vit().double()
    model = make_model(vit, make_method(vit, 40, 2, dropout=0.25))
    pixels = random_pixels(1)
    evaluated = projected_inputs(model.eval(), pixels, 40)
    assert all(torch.equal(seen, row) for seen, row in zip(evaluated, model.method.visual, strict=True))
    torch.manual_seed(0)
    trained = projected_inputs(model.train(), pixels, 40)
    assert len(trained) == DEPTH
    for seen, row in zip(trained, model.method.visual, strict=True):
        dropped = seen == 0
        # 1280 draws of 1/4: five standard deviations are 0.06
        assert float(dropped.double().mean()) == pytest.approx(0.25, abs=0.06)
        assert torch.allclose(seen[~dropped], row.detach()[~dropped] / 0.75)


def test_key_value_prompts_and_images_are_never_dropped():
    vit = make_vit(pos_drop_rate=0.5, proj_drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5).double()
    pixels = random_pixels(2)
    for method in (make_method(vit, 0, 4, dropout=0.9), NoPrompts()):
        model = make_model(vit, method)
        expected = model.eval().features(pixels)
        assert torch.equal(model.train().features(pixels), expected)


def test_the_backbone_stays_in_eval_mode_without_gradients():
    vit = make_vit().double()
    model = make_model(vit, make_method(vit, 3, 2)).train()
    assert model.training
    assert model.method.training
    assert model.head.training
    assert not any(module.training for module in vit.modules())
    F.cross_entropy(model(random_pixels(3)), torch.tensor([0, 1, 2])).backward()
    assert all(parameter.grad is None for parameter in vit.parameters())
    for name, parameter in model.named_parameters():
        if not name.startswith("vit."):
            assert float(parameter.grad.abs().max()) > 0, name
    assert not model.eval().training


def test_the_trained_state_holds_prompts_and_head_alone_and_restores_them():
    vit: VisionTransformer = make_vit()
    model = PromptedViT(vit, make_method(vit, 3, 2, kv_shared=False), CLASSES)
    state = model.trained_state()
    names = [f"method.{kind}.{index}" for kind in ("visual", "kv", "kv_value") for index in range(DEPTH)]
    assert sorted(state) == sorted([*names, "head.weight", "head.bias"])
    with torch.no_grad():
        for parameter in [*model.method.parameters(), *model.head.parameters()]:
            parameter.zero_()
    assert all(float(value.abs().max()) > 0 for name, value in state.items() if name != "head.bias")
    model.load_trained_state(state)
    assert all(torch.equal(value, state[name]) for name, value in model.trained_state().items())


@pytest.mark.parametrize(("tokens", "kv_tokens"), [(7, 3)])
def test_initial_prompts_are_uniform_within_the_papers_bounds(tokens, kv_tokens):
    vit = make_vit(embed_dim=64)
    method = E2VPT(
        dimensions_of(vit), Kept.everything(DEPTH, tokens, kv_tokens), generator=torch.Generator().manual_seed(0)
    )
    visual = torch.cat([row.detach().flatten() for row in method.visual])
    kv = torch.cat([row.detach().flatten() for row in method.kv])
    for values, bound in ((visual, math.sqrt(6 / (3 * 4 * 4 + 64))), (kv, math.sqrt(6 / (kv_tokens * 32)))):
        assert float(values.abs().max()) <= bound
        assert float(values.abs().max()) > 0.95 * bound
        assert float(values.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
