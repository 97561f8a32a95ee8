from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vpdeploy.format.graphfacts import ImageInput
from vpdeploy.format.layout import Layout
from vpdeploy.format.task import BackboneId, TaskCard
from vpdeploy.table import Table
from vpdeploy_export.compilation import compile_prompts
from vpdeploy_export.graph import FoldedGraph, SwitchableGraph
from vpdeploy_train.methods.kept import Kept
from vpdeploy_train.methods.method import NoPrompts
from vpdeploy_train.prompted import PromptedViT, normalise_pixels
from vpdeploy_train.trunks import trunk_of

MakePixels = Callable[..., np.ndarray]

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "average": {"global_pool": "avg", "class_token": False},
    "average with class token": {"global_pool": "avg"},
    "registers": {"reg_tokens": 2},
    "layer scale": {"init_values": 0.5},
    "qk norm": {"qk_norm": True},
    "pre norm": {"pre_norm": True},
    "no qkv bias": {"qkv_bias": False},
    "scaled attention norm": {"scale_attn_norm": True},
    "positions without class token": {"no_embed_class": True, "reg_tokens": 1},
    "all": {"reg_tokens": 2, "init_values": 0.5, "qk_norm": True, "no_embed_class": True},
}


def vit_of(**options: Any) -> VisionTransformer:
    vit = VisionTransformer(
        img_size=tiny_runs.SIDE,
        patch_size=tiny_runs.PATCH,
        embed_dim=tiny_runs.WIDTH,
        depth=tiny_runs.DEPTH,
        num_heads=tiny_runs.HEADS,
        mlp_ratio=2,
        num_classes=0,
        **options,
    )
    return tiny_runs.randomise(vit, seed=4)


def prompted(vit: VisionTransformer, kept: Kept | None, *, classes: int = 5, seed: int = 1) -> PromptedViT:
    method = NoPrompts() if kept is None else tiny_runs.e2vpt(tiny_runs.dimensions_of(vit), kept, seed=seed)
    return tiny_runs.prompted(vit, method, classes, seed=seed)


def trained_answer(model: PromptedViT, pixels: np.ndarray) -> Tensor:
    preprocessing = tiny_runs.PREPROCESSING
    with torch.no_grad():
        return model(
            normalise_pixels(
                torch.from_numpy(pixels), torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
            )
        )


def folded(model: PromptedViT, image_input: ImageInput, opset: int) -> FoldedGraph:
    return FoldedGraph(
        model.trunk,
        tiny_runs.PREPROCESSING,
        compile_prompts(model),
        model.head,
        dtype=torch.float32,
        image_input=image_input,
        opset=opset,
    )


RAGGED = tiny_runs.ragged_kept([[0, 3, 7], [], [1]], [[0, 2], [], [1, 3]])


def close(found: Tensor, expected: Tensor) -> None:
    scale = max(1.0, float(expected.abs().max()))
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_folded_graph_is_the_trained_model(random_pixels: MakePixels, variant: str, opset: int):
    model = prompted(vit_of(**VARIANTS[variant]), RAGGED)
    pixels = random_pixels(3)
    close(folded(model, "uint8", opset)(torch.from_numpy(pixels)), trained_answer(model, pixels))


def test_prompts_matter_so_that_losing_them_would_show(random_pixels: MakePixels):
    vit = vit_of()
    pixels = random_pixels(3)
    with_prompts, without = (trained_answer(prompted(vit, kept), pixels) for kept in (RAGGED, None))
    assert (with_prompts - without).abs().min() > 1e-3


@pytest.mark.parametrize("opset", [20, 23])
def test_normalised_float_images_give_the_same(random_pixels: MakePixels, opset: int):
    model = prompted(vit_of(), RAGGED)
    pixels = random_pixels(3)
    preprocessing = tiny_runs.PREPROCESSING
    image = normalise_pixels(
        torch.from_numpy(pixels), torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
    )
    close(folded(model, "float", opset)(image), trained_answer(model, pixels))


@pytest.mark.parametrize(
    "kept", [None, Kept.everything(tiny_runs.DEPTH, 12, 0), Kept.everything(tiny_runs.DEPTH, 0, 3)]
)
def test_any_number_of_prompts_folds(random_pixels: MakePixels, kept: Kept | None):
    model = prompted(vit_of(), kept)
    pixels = random_pixels(2)
    close(folded(model, "uint8", 20)(torch.from_numpy(pixels)), trained_answer(model, pixels))


def test_merged_zero_tokens_fold_exactly(random_pixels: MakePixels):
    model = prompted(vit_of(), Kept.everything(tiny_runs.DEPTH, 4, 0))
    with torch.no_grad():
        for parameter in model.method.visual:  # type: ignore[union-attr]
            parameter[1:] = 0
    graph = folded(model, "uint8", 20)
    assert graph.prefix_key_0.shape[2] == 2
    pixels = random_pixels(2)
    close(graph(torch.from_numpy(pixels)), trained_answer(model, pixels))


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("variant", ["plain", "average", "all"])
def test_the_switchable_graph_is_every_trained_model_in_one_batch(random_pixels: MakePixels, variant: str, opset: int):
    vit = vit_of(**VARIANTS[variant])
    kepts = [RAGGED, Kept.everything(tiny_runs.DEPTH, 9, 2), None]
    models = [prompted(vit, kept, classes=3 + index, seed=index) for index, kept in enumerate(kepts)]
    identity = BackboneId(
        name="x", sha256="0", depth=len(vit.blocks), width=tiny_runs.WIDTH, heads=tiny_runs.HEADS, patch_size=8
    )
    sets = []
    for index, model in enumerate(models):
        labels = tuple(map(str, range(3 + index)))
        card = TaskCard(
            name=f"t{index}",
            labels=labels,
            method="e2vpt",
            backbone=identity,
            preprocessing=tiny_runs.PREPROCESSING,
        )
        sets.append(tiny_runs.compiled_set(model, card))
    table = Table.of(sets)
    layout = sets[0].layout
    graph = SwitchableGraph(trunk_of(vit), tiny_runs.PREPROCESSING, layout, dtype=torch.float32, opset=opset)
    pixels = random_pixels(6)
    slots = [2, 0, 1, 1, 0, 2]
    inputs = [torch.from_numpy(array) for array in table.arrays.values()]
    found = graph(torch.from_numpy(pixels), torch.tensor(slots, dtype=torch.int32), *inputs)
    for row, slot in enumerate(slots):
        close(found[row, : 3 + slot], trained_answer(models[slot], pixels[row : row + 1])[0])
        assert (found[row, 3 + slot :] < -20000).all()


def test_building_a_graph_leaves_the_backbone_as_it_was():
    vit = vit_of()
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    identity = BackboneId(
        name="x", sha256="0", depth=tiny_runs.DEPTH, width=tiny_runs.WIDTH, heads=tiny_runs.HEADS, patch_size=8
    )
    layout = Layout.for_backbone(identity, dtype="float16")
    graph = SwitchableGraph(trunk_of(vit), tiny_runs.PREPROCESSING, layout, dtype=torch.float16, opset=20)
    after = vit.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not {id(each) for each in vit.parameters()} & {id(each) for each in graph.parameters()}


def test_half_precision_keeps_the_head_and_the_logits_wide(random_pixels: MakePixels):
    model = prompted(vit_of(), RAGGED)
    graph = FoldedGraph(
        model.trunk,
        tiny_runs.PREPROCESSING,
        compile_prompts(model),
        model.head,
        dtype=torch.float16,
        image_input="uint8",
        opset=20,
    )
    assert graph.head_weight.dtype == torch.float32
    assert {value.dtype for name, value in graph.state_dict().items() if "blocks" in name} == {torch.float16}
    pixels = random_pixels(2)
    found = graph(torch.from_numpy(pixels))
    assert found.dtype == torch.float32
    expected = trained_answer(model, pixels)
    assert (found - expected).abs().max() < 2e-2 * expected.abs().max()


def test_every_pixel_value_is_exact_in_half_precision():
    pixels = np.arange(256, dtype=np.float64)
    scaled = (pixels - 128) / 128
    np.testing.assert_array_equal(scaled.astype(np.float16).astype(np.float64), scaled)
