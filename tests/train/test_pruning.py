"""Importance scores, what they keep, and the choice among candidates."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from train.toys import (
    CLASSES,
    DEPTH,
    WIDTH,
    dimensions_of,
    features_with_tokens,
    make_method,
    make_model,
    make_vit,
    random_pixels,
    random_segments,
    segment_factors,
)

from vpdeploy.errors import BundleCorruptError, SpecError, TrainingError
from vpdeploy_train.methods import restore_method
from vpdeploy_train.methods.e2vpt import spread_segments
from vpdeploy_train.methods.kept import SEGMENTS, Kept
from vpdeploy_train.methods.method import NoPrompts
from vpdeploy_train.methods.vapt import VAPT
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.pruning.scores import Scores, score_prompts
from vpdeploy_train.pruning.search import kept_for
from vpdeploy_train.pruning.selection import keep_hidden, keep_kv_tokens, keep_segments, keep_tokens, zero_tokens
from vpdeploy_train.shares import Shares

TOKENS, KV_TOKENS = 5, 3


def batches(sizes: tuple[int, ...] = (4, 4, 3)) -> list[tuple[Tensor, Tensor]]:
    labels = torch.Generator().manual_seed(9)
    return [
        (random_pixels(size, seed=20 + number), torch.randint(0, CLASSES, (size,), generator=labels))
        for number, size in enumerate(sizes)
    ]


def reference_scores(model: PromptedViT, scope: str) -> dict[str, list[Tensor]]:
    """Multiply mask variables into prompts that run as tokens, and average |∂L/∂ρ| over the batches."""
    method = model.method
    rows = 1 if scope == "shared" else DEPTH
    shapes = {"tokens": (rows, TOKENS), "kv_tokens": (rows, KV_TOKENS), "segments": (rows, TOKENS, SEGMENTS)}
    totals = {kind: torch.zeros(shape, dtype=torch.float64) for kind, shape in shapes.items()}
    one_hot = torch.stack(
        [
            segment_factors([[k == segment for k in range(SEGMENTS)]], WIDTH, method.segment_order)[0]
            for segment in range(SEGMENTS)
        ]
    )
    for pixels, labels in batches():
        rho = {kind: torch.ones(shape, dtype=torch.float64, requires_grad=True) for kind, shape in shapes.items()}
        visual, kv = [], []
        for block in range(DEPTH):
            row = 0 if scope == "shared" else block
            pruned = segment_factors(method.kept.segments[block], WIDTH, method.segment_order)
            factor = pruned * (rho["segments"][row] @ one_hot) * rho["tokens"][row][:, None]
            visual.append(method.visual[block].detach() * factor)
            values = method.kv if method.kv_shared else method.kv_value
            mask = rho["kv_tokens"][row][None, :, None]
            kv.append((method.kv[block].detach() * mask, values[block].detach() * mask))
        logits = model.head(features_with_tokens(model.vit, pixels, visual, kv)).double()
        gradients = torch.autograd.grad(F.cross_entropy(logits, labels), list(rho.values()))
        for kind, gradient in zip(rho, gradients, strict=True):
            totals[kind] += gradient.abs()
    return {
        kind: [(total / len(batches()))[0 if scope == "shared" else block] for block in range(DEPTH)]
        for kind, total in totals.items()
    }


@pytest.mark.parametrize("scope", ["layer", "shared"])
@pytest.mark.parametrize("order", ["contiguous", "strided"])
@pytest.mark.parametrize("kv_shared", [True, False])
@pytest.mark.parametrize("pruned_segments", [False, True])
def test_scores_are_the_mean_absolute_gradients_of_mask_variables(scope, order, kv_shared, pruned_segments):
    vit = make_vit(global_pool="avg").double()
    segments = random_segments(TOKENS) if pruned_segments else None
    method = make_method(vit, TOKENS, KV_TOKENS, kv_shared=kv_shared, segment_order=order, segments=segments)
    model = make_model(vit, method)
    expected = reference_scores(model, scope)
    scores = score_prompts(model, batches(), scope=scope)
    for kind in ("tokens", "kv_tokens", "segments"):
        found = getattr(scores, kind)
        assert len(found) == DEPTH
        for mine, theirs in zip(found, expected[kind], strict=True):
            assert float(theirs.abs().max()) > 0
            assert float((mine - theirs).abs().max() / theirs.abs().max()) < 1e-9


def test_gradients_of_opposite_sign_do_not_cancel():
    vit = make_vit().double()
    model = make_model(vit, make_method(vit, TOKENS, KV_TOKENS), classes=2)
    pixels = random_pixels(1)
    with torch.no_grad():
        # Both classes get logit 0, so the two labels pull with gradients that differ in sign alone.
        model.head.bias.copy_(-model.head.weight @ model.features(pixels)[0])
    first, second = [(pixels, torch.tensor([0]))], [(pixels, torch.tensor([1]))]
    alone = score_prompts(model, first, scope="layer")
    both = score_prompts(model, first + second, scope="layer")
    for kind in ("tokens", "kv_tokens", "segments"):
        for one, two in zip(getattr(alone, kind), getattr(both, kind), strict=True):
            assert float(one.min()) > 0
            assert torch.allclose(one, two, rtol=1e-9, atol=0)


def test_scoring_changes_nothing():
    vit = make_vit().double()
    model = make_model(vit, make_method(vit, TOKENS, KV_TOKENS)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls: list[None] = []
    again = [score_prompts(model, batches(), scope="layer", on_batch=lambda: calls.append(None)) for _ in range(2)]
    assert len(calls) == 2 * len(batches())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    # Dropout would make the second scores differ.
    assert all(torch.equal(a, b) for a, b in zip(again[0].segments, again[1].segments, strict=True))


def test_a_method_without_prompts_cannot_be_scored():
    with pytest.raises(SpecError, match="NoPrompts has no prompts to prune"):
        score_prompts(make_model(make_vit().double(), NoPrompts()), batches(), scope="layer")


def test_scoring_without_images_is_refused():
    vit = make_vit().double()
    with pytest.raises(SpecError, match="no images"):
        score_prompts(make_model(vit, make_method(vit, 1, 1)), [], scope="layer")


def test_scores_that_are_not_finite_are_refused():
    vit = make_vit().double()
    model = make_model(vit, make_method(vit, TOKENS, KV_TOKENS))
    model.method.visual[1].data[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="not finite"):
        score_prompts(model, batches(), scope="layer")


@pytest.mark.parametrize(("tokens", "kv_tokens"), [(0, 3), (4, 0)])
def test_a_kind_of_prompt_that_is_absent_has_no_scores(tokens, kv_tokens):
    vit = make_vit().double()
    scores = score_prompts(make_model(vit, make_method(vit, tokens, kv_tokens)), batches(), scope="layer")
    assert [len(block) for block in scores.tokens] == [tokens] * DEPTH
    assert [len(block) for block in scores.kv_tokens] == [kv_tokens] * DEPTH


@pytest.mark.parametrize("order", ["contiguous", "strided"])
def test_segments_spread_as_written_down(order):
    values = torch.arange(2.0 * SEGMENTS).reshape(2, SEGMENTS)
    channels = spread_segments(values, 4 * SEGMENTS, order)
    for channel in range(4 * SEGMENTS):
        segment = channel // 4 if order == "contiguous" else channel % SEGMENTS
        assert torch.equal(channels[:, channel], values[:, segment])


def make_scores(
    tokens: list[list[float]], kv_tokens: list[list[float]], segments: Any = None, hidden: tuple[float, ...] = ()
) -> Scores:
    if segments is None:
        segments = [[[1.0] * SEGMENTS] * len(block) for block in tokens]
    return Scores(
        tokens=[torch.tensor(block) for block in tokens],
        kv_tokens=[torch.tensor(block) for block in kv_tokens],
        segments=[torch.tensor(block) for block in segments],
        hidden=torch.tensor(hidden),
    )


def test_the_highest_scores_stay_in_their_original_order():
    scores = make_scores([[0.1, 0.9, 0.3, 0.7], [4.0, 3.0, 2.0, 1.0]], [[0.0, 5.0], [5.0, 0.0]])
    kept = keep_kv_tokens(keep_tokens(Kept.everything(2, 4, 2), scores, 0.5), scores, 0.5)
    assert kept.tokens == ((1, 3), (0, 1))
    assert kept.kv_tokens == ((1,), (0,))
    assert kept.segments == (((True,) * SEGMENTS,) * 2,) * 2


@pytest.mark.parametrize(
    ("count", "share", "left"),
    [(10, 0.5, 5), (10, 0.59, 5), (5, 0.5, 2), (4, 0.1, 1), (1, 0.1, 1), (3, 1.0, 3), (0, 0.5, 0), (100, 0.29, 29)],
)
def test_the_floor_of_the_share_is_kept_but_at_least_one(count, share, left):
    scores = make_scores([list(map(float, range(count)))], [list(map(float, range(count)))])
    kept = keep_kv_tokens(keep_tokens(Kept.everything(1, count, count), scores, share), scores, share)
    assert kept.tokens == kept.kv_tokens == (tuple(range(count - left, count)),)


def test_of_equal_scores_the_earlier_index_stays():
    scores = make_scores([[1.0, 2.0, 1.0, 1.0, 1.0]], [[0.0] * 3])
    kept = keep_kv_tokens(keep_tokens(Kept.everything(1, 5, 3), scores, 0.6), scores, 0.6)
    assert kept.tokens == ((0, 1, 2),)
    assert kept.kv_tokens == ((0,),)


def test_selection_speaks_of_original_indices():
    kept = Kept(tokens=((2, 5, 7),), kv_tokens=((1, 4),), segments=(((True,) * SEGMENTS,) * 3,))
    scores = make_scores([[1.0, 3.0, 2.0]], [[0.0, 1.0]])
    again = keep_kv_tokens(keep_tokens(kept, scores, 0.7), scores, 0.7)
    assert again.tokens == ((5, 7),)
    assert again.kv_tokens == ((4,),)


def test_each_token_keeps_its_own_best_segments():
    rising = [float(k) for k in range(SEGMENTS)]
    scores = make_scores([[1.0, 1.0]], [[]], [[rising, rising[::-1]]])
    kept = keep_segments(Kept.everything(1, 2, 0), scores, 0.25)
    assert kept.segments == (((False,) * 12 + (True,) * 4, (True,) * 4 + (False,) * 12),)
    assert keep_segments(Kept.everything(1, 2, 0), scores, 0.01).segments[0][0] == (False,) * 15 + (True,)


@pytest.mark.parametrize("kv_shared", [True, False])
def test_pruning_gathers_the_rows_of_the_state_it_rewinds_to(kv_shared):
    vit = make_vit()
    method = make_method(vit, 6, 4, kv_shared=kv_shared, dropout=0.3, segment_order="strided")
    initial = {name: torch.randn(value.shape) for name, value in method.state_dict().items()}
    tokens, kv_tokens = ((0, 5), (3,), (1, 2, 4)), ((2,), (0, 3), (0, 1, 2, 3))
    kept = Kept(tokens=tokens, kv_tokens=kv_tokens, segments=random_segments(6))
    kept = Kept(
        tokens=tokens,
        kv_tokens=kv_tokens,
        segments=tuple(block[: len(row)] for block, row in zip(kept.segments, tokens, strict=True)),
    )
    smaller = method.pruned_to(kept, initial)
    assert smaller.kept == kept
    assert (smaller.dropout, smaller.segment_order, smaller.kv_shared) == (0.3, "strided", kv_shared)
    expected = {f"visual.{block}": initial[f"visual.{block}"][list(rows)] for block, rows in enumerate(tokens)}
    for name in ("kv",) if kv_shared else ("kv", "kv_value"):
        for block, rows in enumerate(kv_tokens):
            expected[f"{name}.{block}"] = initial[f"{name}.{block}"][:, list(rows)]
    state = smaller.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())
    for block, rows in enumerate(tokens):
        factor = segment_factors(kept.segments[block], WIDTH, "strided").float()
        assert torch.equal(smaller.rows(block), initial[f"visual.{block}"][list(rows)] * factor)


def test_pruning_twice_speaks_of_the_original_indices():
    vit = make_vit()
    method = make_method(vit, 6, 4)

    def kept(tokens: tuple[int, ...], kv_tokens: tuple[int, ...]) -> Kept:
        rows = ((True,) * SEGMENTS,) * len(tokens)
        return Kept(tokens=(tokens,) * DEPTH, kv_tokens=(kv_tokens,) * DEPTH, segments=(rows,) * DEPTH)

    once = method.pruned_to(kept((1, 3, 5), (0, 2)), method.state_dict())
    twice = once.pruned_to(kept((3, 5), (2,)), once.state_dict())
    assert all(torch.equal(a, b[[3, 5]]) for a, b in zip(twice.visual, method.visual, strict=True))
    assert all(torch.equal(a, b[:, [2]]) for a, b in zip(twice.kv, method.kv, strict=True))
    with torch.no_grad():
        twice.visual[0].zero_()
    assert float(method.visual[0].detach().abs().max()) > 0


def test_segments_are_scored_on_what_remains_of_the_tokens():
    vit = make_vit()
    model = PromptedViT(vit, make_method(vit, 6, 2), CLASSES)
    images = [(pixels.float(), labels) for pixels, labels in batches()]
    scores = score_prompts(model, images, scope="layer")
    tokens_only = kept_for(model, scores, images, shares=Shares(tokens=0.5), scope="layer")
    assert [len(block) for block in tokens_only.tokens] == [3] * DEPTH
    assert tokens_only.segments == (((True,) * SEGMENTS,) * 3,) * DEPTH
    both = kept_for(model, scores, images, shares=Shares(tokens=0.5, segments=0.75), scope="layer")
    assert both.tokens == tokens_only.tokens
    smaller = PromptedViT(vit, model.method.pruned_to(tokens_only, model.method.state_dict()), CLASSES)
    smaller.head.load_state_dict(model.head.state_dict())
    remaining = score_prompts(smaller, images, scope="layer").segments
    for flags, rows in zip(both.segments, remaining, strict=True):
        for row_flags, row in zip(flags, rows, strict=True):
            best = set(row.topk(12).indices.tolist())
            assert {position for position, flag in enumerate(row_flags) if flag} == best


def test_parameters_are_counted_without_pruned_segments():
    vit = make_vit()
    segments = random_segments(6)
    zeroed = sum(not flag for block in segments for row in block for flag in row)
    expected = DEPTH * 6 * WIDTH + DEPTH * 4 * WIDTH - zeroed * (WIDTH // SEGMENTS)
    assert make_method(vit, 6, 4, segments=segments).summary()["parameters"] == expected
    assert make_method(vit, 6, 4, kv_shared=False).summary()["parameters"] == DEPTH * (6 + 2 * 4) * WIDTH


def test_a_token_that_is_zero_stays_and_keeps_no_segment():
    scores = make_scores([[0.1, 0.9, 0.3, 0.7]], [[0.0, 5.0]], [[[1.0] * SEGMENTS] * 4])
    kept = keep_kv_tokens(zero_tokens(Kept.everything(1, 4, 2), scores, 0.5), scores, 0.5)
    assert kept.tokens == ((0, 1, 2, 3),)
    assert kept.kv_tokens == ((1,),)
    assert [any(flags) for flags in kept.segments[0]] == [False, True, False, True]
    assert (kept.live_tokens, kept.columns) == ([2], [2 + 1 + 1])
    segments = keep_segments(kept, scores, 0.5).segments[0]
    assert [sum(flags) for flags in segments] == [0, 8, 0, 8]


def test_zero_tokens_are_attended_to_and_removed_ones_are_not():
    vit = make_vit().double()
    method = make_method(vit, 4, 2).double()
    whole, zero = (True,) * SEGMENTS, (False,) * SEGMENTS
    all_tokens = replace(method.kept, segments=((whole, zero, whole, zero),) * DEPTH)
    two_tokens = replace(method.kept, tokens=((0, 2),) * DEPTH, segments=((whole, whole),) * DEPTH)
    zeroed, removed = (method.pruned_to(kept, method.state_dict()) for kept in (all_tokens, two_tokens))
    pixels = random_pixels(3)
    rows = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)[:, None]
    # What goes through the smaller methods' float32 tensors is made float32 here, too.
    visual = [block.detach().float().double() * rows for block in method.visual]
    kv = [(block.detach().float().double(),) * 2 for block in method.kv]
    with torch.no_grad():
        expected = features_with_tokens(vit, pixels, visual, kv)
        found, other = (make_model(vit, each).features(pixels) for each in (zeroed, removed))
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-9
    assert float((found - other).abs().max() / expected.abs().max()) > 1e-4
    assert zeroed.summary()["parameters"] == removed.summary()["parameters"]


def test_key_value_prompts_are_left_alone_where_asked():
    vit = make_vit()
    model = PromptedViT(vit, make_method(vit, 4, 4), CLASSES)
    images = [(pixels.float(), labels) for pixels, labels in batches()]
    scores = score_prompts(model, images, scope="layer")
    kept = kept_for(model, scores, images, shares=Shares(tokens=0.5), scope="layer", prune_kv=False)
    assert [len(block) for block in kept.tokens] == [2] * DEPTH
    assert [len(block) for block in kept.kv_tokens] == [4] * DEPTH


def make_vapt(tokens: int = 4, hidden: int = 6) -> tuple[Any, VAPT]:
    vit = make_vit()
    method = VAPT(dimensions_of(vit), Kept.everything(DEPTH, tokens, 0, hidden))
    source = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=source)
    return vit, method.eval()


def test_adaptive_prompts_are_pruned_by_tokens_and_hidden_units():
    vit, method = make_vapt()
    model = PromptedViT(vit, method, CLASSES)
    images = [(pixels.float(), labels) for pixels, labels in batches()]
    scores = score_prompts(model, images, scope="layer")
    kept = kept_for(model, scores, images, shares=Shares(tokens=0.5, hidden=0.5), scope="layer")
    for block, found in enumerate(kept.tokens):
        assert found == tuple(sorted(scores.tokens[block].topk(2).indices.tolist()))
    assert kept.hidden == tuple(sorted(scores.hidden.topk(3).indices.tolist()))
    smaller = method.pruned_to(kept, method.state_dict())
    assert (smaller.down.shape, smaller.up.shape) == ((3, WIDTH), (WIDTH, 3))
    with torch.no_grad():
        tokens = model.trunk.embed(images[0][0])
        whole = method.prompts(1, model.trunk, tokens)
        fewer = method.pruned_to(replace(kept, hidden=method.kept.hidden), method.state_dict()).eval()
        # Removing tokens leaves the others' prompts as they were.
        assert torch.allclose(fewer.prompts(1, model.trunk, tokens), whole[:, list(kept.tokens[1])], atol=1e-5)


def test_of_hidden_units_the_best_stay():
    scores = make_scores([[1.0]], [[]], hidden=(0.1, 0.9, 0.5))
    assert keep_hidden(Kept.everything(1, 1, 0, 3), scores, 0.7).hidden == (1, 2)


def make_kept() -> Kept:
    segments = random_segments(3, depth=2)
    return Kept(tokens=((0, 4, 9), (2,)), kv_tokens=((), (1, 3)), segments=(segments[0], segments[1][:1]))


def test_what_was_kept_survives_json():
    kept = make_kept()
    assert Kept.from_fields(json.loads(json.dumps(kept.to_fields()))) == kept


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": [[0, 4], [2]]},
        {"tokens": [[0, 4, 9]]},
        {"kv_tokens": [[]]},
        {"segments": [["1" * 16] * 3, ["1" * 15]]},
        {"segments": [["1" * 16] * 3, []]},
        {"segments": [["1" * 16] * 3, ["2" * 16]]},
        {"tokens": [[0, 4, 4], [2]]},
        {"tokens": [[9, 4, 0], [2]]},
        {"tokens": [[-1, 4, 9], [2]]},
        {"kv_tokens": [[], [1, 1]]},
    ],
)
def test_contradictory_fields_are_refused(change):
    with pytest.raises(ValueError, match=r"kept|segment"):
        Kept.from_fields({**make_kept().to_fields(), **change})


@pytest.mark.parametrize(
    "change",
    [
        {"kept": None},
        {"kept": {}},
        {"kept": {"tokens": [["x"]], "kv_tokens": [[]], "segments": [["1" * 16]]}},
        {"kept": Kept.everything(DEPTH + 1, 2, 1).to_fields()},
        {"segment_order": "sideways"},
    ],
)
def test_a_structure_that_makes_no_sense_is_refused(change):
    method = make_method(make_vit(), 2, 1)
    with pytest.raises(BundleCorruptError, match="makes no sense"):
        restore_method("e2vpt", method.dimensions, {**method.structure(), **change})


@pytest.mark.parametrize(
    ("name", "structure"),
    [
        *(("vpt-shallow", {"tokens": tokens}) for tokens in (-1, 10**14, float("inf"), "3", True)),
        *(("lora", {"rank": rank, "alpha": 1.0}) for rank in (0, -3, 10**14)),
        ("lora", {"rank": 2, "alpha": float("nan")}),
        *(("vapt", {"kernel": kernel, "eps": 1e-6}) for kernel in (0, -2, 100)),
        *(("vapt", {"kernel": 2, "eps": eps}) for eps in (0.0, -1.0, float("nan"))),
        ("vapt", {"kernel": 2, "eps": 1e-6, "grid": 99}),
    ],
)
def test_a_structure_of_impossible_numbers_is_refused_before_anything_is_made(name, structure):
    dimensions = make_method(make_vit(), 2, 0).dimensions
    fitting = {"grid": dimensions.grid, "kept": Kept.everything(DEPTH, 2, 0, 2).to_fields()}
    with pytest.raises(BundleCorruptError, match="makes no sense"):
        restore_method(name, dimensions, {**fitting, **structure})


@pytest.mark.parametrize("kv_shared", [True, False])
@pytest.mark.parametrize("order", ["contiguous", "strided"])
def test_a_method_is_rebuilt_from_its_structure(kv_shared, order):
    vit = make_vit().double()
    options: dict[str, Any] = {"kv_shared": kv_shared, "segment_order": order, "segments": random_segments(4)}
    method = make_method(vit, 4, 2, **options)
    structure = json.loads(json.dumps(method.structure()))
    restored = restore_method("e2vpt", method.dimensions, structure)
    restored.load_state_dict(method.state_dict(), strict=True)
    pixels = random_pixels(2)
    assert torch.equal(make_model(vit, restored).features(pixels), make_model(vit, method).features(pixels))
