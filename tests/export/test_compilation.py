from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import tiny_runs
import torch

from vpdeploy.errors import ExportError
from vpdeploy.format.layout import MASKED
from vpdeploy.format.task import BackboneId, TaskCard
from vpdeploy_export.compilation import CompiledBlock, compile_prompts
from vpdeploy_train.methods.e2vpt import E2VPT
from vpdeploy_train.methods.kept import Kept
from vpdeploy_train.methods.method import NoPrompts, PromptMethod
from vpdeploy_train.prompted import PromptedViT

Array = npt.NDArray[np.float64]

RAGGED = tiny_runs.ragged_kept([[0, 3, 7], [], [1]], [[0, 2], [4], [1, 3]])
HEADS, HEAD_WIDTH, WIDTH = tiny_runs.HEADS, tiny_runs.WIDTH // tiny_runs.HEADS, tiny_runs.WIDTH
CARD = TaskCard(
    name="flowers",
    labels=("a", "b", "c"),
    method="e2vpt",
    backbone=BackboneId(
        name="x", sha256="0" * 64, depth=tiny_runs.DEPTH, width=WIDTH, heads=HEADS, patch_size=tiny_runs.PATCH
    ),
    preprocessing=tiny_runs.PREPROCESSING,
)


def model_of(method: PromptMethod | None = None, *, kv_shared: bool = True) -> PromptedViT:
    vit = tiny_runs.randomise(tiny_runs.vit_fixture_patch8_32(), seed=0)
    chosen = method or tiny_runs.e2vpt(tiny_runs.dimensions_of(vit), RAGGED, kv_shared=kv_shared)
    return tiny_runs.prompted(vit, chosen, 3)


def float64(tensor: torch.Tensor) -> Array:
    return tensor.detach().numpy().astype(np.float64)


def by_hand(model: PromptedViT, index: int) -> tuple[Array, Array]:
    """K = [A_k ; heads(W_k LN(P) + b_k)], V = [A_v ; heads(W_v LN(P) + b_v)], each [H, P, d], in NumPy."""
    method, block = model.method, model.vit.blocks[index]
    assert isinstance(method, E2VPT)
    prompts = float64(method.visual[index]).copy()
    prompts[:, : WIDTH // 16] = 0  # the fixture prunes the first of 16 segments of every token
    mean, variance = prompts.mean(1, keepdims=True), prompts.var(1, keepdims=True)
    normalised = (prompts - mean) / np.sqrt(variance + block.norm1.eps)
    normalised = normalised * float64(block.norm1.weight) + float64(block.norm1.bias)
    weight, bias = float64(block.attn.qkv.weight), float64(block.attn.qkv.bias)

    def heads(part: int) -> Array:
        rows = slice(part * WIDTH, (part + 1) * WIDTH)
        flat = normalised @ weight[rows].T + bias[rows]
        return flat.reshape(len(prompts), HEADS, HEAD_WIDTH).transpose(1, 0, 2)

    key_prompts = float64(method.kv[index])
    value_prompts = key_prompts if method.kv_value is None else float64(method.kv_value[index])
    return np.concatenate([key_prompts, heads(1)], 1), np.concatenate([value_prompts, heads(2)], 1)


@pytest.mark.parametrize("kv_shared", [True, False], ids=["shared", "separate"])
def test_prefixes_are_those_of_the_formula(kv_shared: bool):
    model = model_of(kv_shared=kv_shared)
    found = compile_prompts(model).blocks
    assert [block.key.shape for block in found] == [(HEADS, count, HEAD_WIDTH) for count in (5, 1, 3)]
    for index, block in enumerate(found):
        key, value = by_hand(model, index)
        np.testing.assert_allclose(block.key, key, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(block.value, value, rtol=1e-12, atol=1e-12)
        assert (block.bias == 0).all()


def test_compiling_leaves_the_model_as_it_was():
    model = model_of()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compile_prompts(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())


def test_a_model_without_prompts_has_empty_prefixes():
    found = compile_prompts(model_of(NoPrompts())).blocks
    assert [block.key.shape for block in found] == [(HEADS, 0, HEAD_WIDTH)] * tiny_runs.DEPTH


def attend(query: Array, prefix: CompiledBlock, head: int = 0) -> Array:
    """softmax(q Kᵀ + bias) V for one head."""
    weights = np.exp(query @ prefix.key[head].T + prefix.bias)
    return (weights / weights.sum(-1, keepdims=True)) @ prefix.value[head]


def repeat_prompts(model: PromptedViT) -> None:
    """Make block 0 hold visual prompts a, b, a and key/value prompts c, c."""
    method = model.method
    assert isinstance(method, E2VPT)
    with torch.no_grad():
        method.visual[0][2] = method.visual[0][0]
        for stored in (method.kv, method.kv_value):
            if stored is not None:
                stored[0][:, 1] = stored[0][:, 0]


@pytest.mark.parametrize("kv_shared", [True, False], ids=["shared", "separate"])
def test_equal_prompts_merge_exactly(kv_shared: bool):
    model = model_of(kv_shared=kv_shared)
    repeat_prompts(model)
    (merged, *_) = compile_prompts(model).blocks
    key, value = by_hand(model, 0)
    firsts = [0, 2, 3]  # c, a, b
    np.testing.assert_allclose(merged.key, key[:, firsts], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merged.value, value[:, firsts], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merged.bias, np.log([2, 2, 1]), rtol=1e-14)
    unmerged = CompiledBlock(key=key, value=value, bias=np.zeros(5))
    for head in range(HEADS):
        query = np.random.default_rng(head).normal(size=(5, HEAD_WIDTH))
        np.testing.assert_allclose(attend(query, merged, head), attend(query, unmerged, head), rtol=1e-12)


def test_equal_prompts_merge_where_a_product_rounds_equal_rows_differently(monkeypatch: pytest.MonkeyPatch):
    model = model_of()
    repeat_prompts(model)
    exact = model.trunk.project
    rows_seen = []

    def rounding(index: int, prompts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows_seen.append(len(prompts))
        by_position = 1 + 2.0**-52 * torch.arange(len(prompts), dtype=prompts.dtype)[:, None]
        return tuple(side * by_position for side in exact(index, prompts))

    monkeypatch.setattr(model.trunk, "project", rounding)
    (merged, *_) = compile_prompts(model).blocks
    assert rows_seen == [2, 1]  # block 1 has no visual prompts
    np.testing.assert_allclose(merged.bias, np.log([2, 2, 1]), rtol=1e-14)


@pytest.mark.parametrize("different", ["kv", "kv_value"])
def test_key_value_prompts_that_differ_in_one_head_of_the_key_or_value_only_do_not_merge(different: str):
    model = model_of(kv_shared=False)
    repeat_prompts(model)
    with torch.no_grad():
        getattr(model.method, different)[0][1, 1, 3] += 1
    (first, *_) = compile_prompts(model).blocks
    np.testing.assert_allclose(first.bias, np.log([1, 1, 2, 1]), atol=1e-14)


def test_prompts_that_differ_in_their_last_bit_do_not_merge():
    model = model_of()
    repeat_prompts(model)
    rows = model.method.visual[0]  # type: ignore[union-attr]
    with torch.no_grad():
        rows[2, 40] = torch.nextafter(rows[2, 40], torch.tensor(torch.inf))
    (first, *_) = compile_prompts(model).blocks
    np.testing.assert_allclose(first.bias, np.log([2, 1, 1, 1]), atol=1e-14)


def test_zeros_of_either_sign_are_one_prompt():
    model = model_of()
    rows = model.method.visual[0]  # type: ignore[union-attr]
    with torch.no_grad():
        rows.zero_()
        rows[1] = -0.0
    (first, *_) = compile_prompts(model).blocks
    np.testing.assert_allclose(first.bias, np.log([1, 1, 3]), atol=1e-14)


def test_zero_tokens_of_a_checkpoint_merge_into_one_column():
    model = model_of()
    method = model.method
    assert isinstance(method, E2VPT)
    with torch.no_grad():
        method.visual[0][1:] = 0
    (first, *_) = compile_prompts(model).blocks
    assert first.key.shape == first.value.shape == (HEADS, 4, HEAD_WIDTH)
    assert first.bias.tolist() == [0, 0, 0, pytest.approx(np.log(2))]


def test_a_packed_prompt_set_holds_the_merged_columns():
    model = model_of()
    repeat_prompts(model)
    prompt_set = tiny_runs.compiled_set(model, CARD, precision="fp32")
    assert prompt_set.sizes()["prefix"] == 3
    np.testing.assert_allclose(prompt_set.tensors["prefix_bias"][0], np.log([2, 2, 1]), rtol=1e-6)


def test_prompts_whose_outputs_are_averaged_stay_rows_of_their_own():
    vit = tiny_runs.randomise(tiny_runs.vit_fixture_patch8_32(global_pool="avg"), seed=0)
    method = tiny_runs.e2vpt(tiny_runs.dimensions_of(vit), Kept.everything(tiny_runs.DEPTH, 3, 2))
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.zero_()
    compiled = compile_prompts(PromptedViT(vit, method, 3, pools_prompts=True).eval())
    assert compiled.pooled is not None
    assert compiled.pooled.shape == (3, WIDTH)
    for block, expected in zip(compiled.blocks, [[2, 3], [2, 3], [2]], strict=True):
        np.testing.assert_allclose(block.bias, np.log(expected), rtol=1e-14)


def test_adaptive_prompts_do_not_merge_but_the_first_blocks_static_ones_do():
    vit = tiny_runs.randomise(tiny_runs.vit_fixture_patch8_32(), seed=0)
    method = tiny_runs.random_method(vit, "vapt", prompt_tokens=4)
    with torch.no_grad():
        for name, parameter in method.named_parameters():
            if name == "first" or name.startswith("linear"):
                parameter.zero_()
    compiled = compile_prompts(tiny_runs.prompted(vit, method, 3))
    np.testing.assert_allclose(compiled.blocks[0].bias, np.log([4]), rtol=1e-14)
    assert [block.generator and len(block.generator.mix) for block in compiled.blocks] == [None, 4, 4]


def test_a_compiled_prompt_set_is_padded_to_its_longest_block():
    prompt_set = tiny_runs.compiled_set(model_of(), CARD, precision="fp32")
    assert prompt_set.sizes() == {"prefix": 5, "classes": 3}
    bias = prompt_set.tensors["prefix_bias"]
    np.testing.assert_array_equal(bias == MASKED, [[0] * 5, [0] + [1] * 4, [0] * 3 + [1] * 2])
    key, value = by_hand(model_of(), 2)
    np.testing.assert_allclose(prompt_set.tensors["prefix_key"][2, :, :3], key, rtol=1e-6)
    np.testing.assert_allclose(prompt_set.tensors["prefix_value"][2, :, :3], value, rtol=1e-6)
    assert (prompt_set.tensors["prefix_key"][2, :, 3:] == 0).all()
    assert all(not array.flags.writeable for array in prompt_set.tensors.values())


def test_the_head_is_stored_as_features_by_classes():
    model = model_of()
    tensors = tiny_runs.compiled_set(model, CARD, precision="fp32").tensors
    np.testing.assert_array_equal(tensors["head_weight"], float64(model.head.weight).T)
    np.testing.assert_array_equal(tensors["head_bias"], float64(model.head.bias))


def test_half_precision_narrows_keys_and_values_only():
    wide = tiny_runs.compiled_set(model_of(), CARD, precision="fp32").tensors
    narrow = tiny_runs.compiled_set(model_of(), CARD, precision="fp16").tensors
    for name in wide:
        expected = np.float16 if name in ("prefix_key", "prefix_value") else np.float32
        assert narrow[name].dtype == expected
        np.testing.assert_allclose(narrow[name], wide[name], rtol=2**-11, atol=1e-7)


def test_half_precision_refuses_what_overflows():
    model = model_of()
    method = model.method
    assert isinstance(method, E2VPT)
    with torch.no_grad():
        method.kv[1][0] = 70000.0
    assert tiny_runs.compiled_set(model, CARD, precision="fp32").tensors["prefix_key"].max() == 70000
    with pytest.raises(
        ExportError, match=r"task 'flowers'.*7e\+04 does not fit float16; export with --bf16, or without --fp16"
    ):
        tiny_runs.compiled_set(model, CARD, precision="fp16")


def test_prompts_that_are_not_finite_are_refused_with_their_block():
    model = model_of()
    method = model.method
    assert isinstance(method, E2VPT)
    with torch.no_grad():
        method.visual[2][0, 40] = float("nan")
    with pytest.raises(ExportError, match=r"block 2: .*not finite"):
        compile_prompts(model)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_head_that_is_not_finite_is_refused(broken: float):
    model = model_of()
    with torch.no_grad():
        model.head.bias[1] = broken
    with pytest.raises(ExportError, match=r"head.*not finite"):
        tiny_runs.compiled_set(model, CARD, precision="fp32")


def test_prompts_that_depend_on_the_image_need_a_generator():
    class Adaptive(NoPrompts):
        def prompts(self, index: int, trunk: object, tokens: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return torch.zeros(len(tokens), 2, WIDTH, dtype=tokens.dtype)

    with pytest.raises(ExportError, match="block 0: prompts that depend on the image"):
        compile_prompts(model_of(Adaptive()))


def test_unpruned_prompts_of_any_count_compile():
    vit = tiny_runs.randomise(tiny_runs.vit_fixture_patch8_32(), seed=0)
    method = tiny_runs.e2vpt(tiny_runs.dimensions_of(vit), Kept.everything(tiny_runs.DEPTH, 9, 2))
    prompt_set = tiny_runs.compiled_set(tiny_runs.prompted(vit, method, 3), replace(CARD, name="x"), precision="fp32")
    assert prompt_set.sizes()["prefix"] == 11
    assert (prompt_set.tensors["prefix_bias"] == 0).all()
