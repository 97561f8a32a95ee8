"""The deployed graph of every family of backbones, run by ONNX Runtime, is the trained model."""

from __future__ import annotations

from pathlib import Path

import architectures
import numpy as np
import onnxruntime
import pytest
import tiny_runs
import torch
from numpy.typing import NDArray
from torch import nn

from vpdeploy.errors import ExportError, SpecError
from vpdeploy.format.graphfacts import ImageInput
from vpdeploy.format.task import BackboneId, TaskCard
from vpdeploy.table import Table
from vpdeploy_export.compilation import compile_prompts, deployed_trunk
from vpdeploy_export.graph import FoldedGraph, SwitchableGraph
from vpdeploy_export.graph.backbone import graph_parts
from vpdeploy_export.onnx.save import save_model
from vpdeploy_export.onnx.trace import build_folded, build_switchable
from vpdeploy_export.packing import choose_layout, pack
from vpdeploy_train.methods import METHODS
from vpdeploy_train.methods.method import PromptDimensions
from vpdeploy_train.prompted import PromptedViT, normalise_pixels
from vpdeploy_train.trunks import trunk_of

WRITTEN = (
    "ViT-Ti/16",
    "patch 32",
    "DeiT-3",
    "DINOv2",
    "DINOv2 with registers",
    "CLIP",
    "SigLIP",
    "averages, no class token",
    "FlexiViT",
    "AIMv2",
    "RMS norms",
    "QK norm",
    "DINOv3",
    "EVA-02",
    "Perception Encoder",
    "Swin-T",
)
"""Cases that are written as ONNX in every run; the others are slow tests."""

CLOSE = 1e-4
"""Largest difference of a logit, relative to the largest logit."""


def random_pixels(model: nn.Module, count: int = 3) -> NDArray[np.uint8]:
    side = trunk_of(model).image_size
    return np.random.default_rng(3).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def expected_logits(model: PromptedViT, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    settings = architectures.preprocessing_of(model.vit)
    mean, std = torch.tensor(settings.mean), torch.tensor(settings.std)
    with torch.no_grad():
        return model.eval()(normalise_pixels(torch.from_numpy(pixels), mean, std)).numpy()


def folded(model: PromptedViT, *, opset: int = 20, image_input: ImageInput = "uint8") -> FoldedGraph:
    return FoldedGraph(
        deployed_trunk(model),
        architectures.preprocessing_of(model.vit),
        compile_prompts(model),
        model.head,
        dtype=torch.float32,
        image_input=image_input,
        opset=opset,
    )


def run_module(graph: FoldedGraph, image: NDArray[np.generic]) -> NDArray[np.float32]:
    with torch.no_grad():
        return graph(torch.from_numpy(image)).numpy()


def run_onnx(graph: FoldedGraph, model: PromptedViT, path: Path, *, opset: int = 20) -> NDArray[np.float32]:
    settings = architectures.preprocessing_of(model.vit)
    save_model(build_folded(graph, settings, opset=opset), path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": random_pixels(model.vit)})[0]


def difference(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("case", architectures.ALL)
def test_the_folded_module_gives_the_models_logits(case):
    model = architectures.with_prompts(architectures.make(case))
    pixels = random_pixels(model.vit)
    expected = expected_logits(model, pixels)
    assert difference(expected[:1], expected[1:2]) > 1e-3
    assert difference(run_module(folded(model), pixels), expected) < CLOSE
    assert difference(run_module(folded(model, opset=23), pixels), expected) < CLOSE


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in WRITTEN else pytest.mark.slow) for case in architectures.ALL]
)
def test_the_folded_onnx_graph_gives_the_models_logits(tmp_path, case):
    model = architectures.with_prompts(architectures.make(case))
    expected = expected_logits(model, random_pixels(model.vit))
    assert difference(run_onnx(folded(model), model, tmp_path / "task.onnx"), expected) < CLOSE


@pytest.mark.parametrize("case", ["DINOv3", pytest.param("Swin-T", marks=pytest.mark.slow)])
def test_an_onnx_graph_with_fused_attention_gives_the_models_logits(tmp_path, case):
    model = architectures.with_prompts(architectures.make(case))
    expected = expected_logits(model, random_pixels(model.vit))
    found = run_onnx(folded(model, opset=23), model, tmp_path / "task.onnx", opset=23)
    assert difference(found, expected) < CLOSE


@pytest.mark.parametrize("case", ["ViT-Ti/16", "DINOv3", "AIMv2", "Swin-T"])
def test_normalised_images_enter_every_patch_embedding(case):
    model = architectures.with_prompts(architectures.make(case))
    image = architectures.random_images(model.vit)
    with torch.no_grad():
        expected = model(image).numpy()
    assert difference(run_module(folded(model, image_input="float"), image.numpy()), expected) < CLOSE


@pytest.mark.parametrize("case", ["MAE's pooling", pytest.param("EVA-02", marks=pytest.mark.slow)])
def test_published_pooling_is_folded_exactly(tmp_path, case):
    vit = architectures.make(case)
    model = PromptedViT(vit, architectures.prompts_for(vit), 4, pools_prompts=True).eval()
    pixels = random_pixels(vit)
    expected = expected_logits(model, pixels)
    assert difference(run_onnx(folded(model), model, tmp_path / "task.onnx"), expected) < CLOSE
    without = PromptedViT(vit, model.method, 4).eval()
    without.head = model.head
    assert difference(expected_logits(without, pixels), expected) > 1e-3


def test_published_pooling_averages_over_shallow_prompts_in_the_graph_too():
    vit = architectures.make("MAE's pooling")
    source = torch.Generator().manual_seed(0)
    prompts = METHODS["vpt-shallow"].create(
        PromptDimensions.of(trunk_of(vit)), METHODS["vpt-shallow"].Options(prompt_tokens=3), source
    )
    model = PromptedViT(vit, prompts, 4, pools_prompts=True).eval()
    pixels = random_pixels(vit)
    assert difference(run_module(folded(model), pixels), expected_logits(model, pixels)) < CLOSE


@pytest.mark.parametrize("case", ["DINOv3", "EVA-02"])
@pytest.mark.parametrize("method", ["vapt", "vpt-shallow", "lora"])
def test_every_method_is_folded_on_rotary_positions(case, method):
    vit = architectures.make(case)
    source = torch.Generator().manual_seed(0)
    options = tiny_runs.options_for(method, prompt_tokens=3, vapt_hidden=2, lora_rank=2)
    prompts = METHODS[method].create(PromptDimensions.of(trunk_of(vit)), options, source)
    with torch.no_grad():
        for parameter in prompts.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=source))
    model = tiny_runs.prompted(vit, prompts, 4, seed=2)
    pixels = random_pixels(vit)
    assert difference(run_module(folded(model), pixels), expected_logits(model, pixels)) < CLOSE


@pytest.mark.parametrize("case", [pytest.param("DINOv3", marks=pytest.mark.slow), "Swin-T"])
def test_tasks_of_different_lengths_share_one_graph(tmp_path, case):
    vit = architectures.make(case)
    trunk, settings = trunk_of(vit), architectures.preprocessing_of(vit)
    stages = trunk.stages
    backbone = BackboneId(
        name="x",
        sha256="0" * 64,
        depth=len(trunk.blocks),
        width=trunk.feature_width,
        heads=stages[-1].heads,
        patch_size=trunk.patch_size,
        hierarchy=stages if len(stages) > 1 else (),
    )
    models = [
        architectures.with_prompts(vit, seed=1),
        architectures.with_prompts(vit, tokens=9, kv_tokens=0, seed=2),
        tiny_runs.prompted(vit, METHODS["linear"](), 4),
    ]
    compiled = [compile_prompts(model) for model in models]
    layout = choose_layout(dict(zip("abc", compiled, strict=True)), backbone, trunk, precision="fp32")
    assert sum(spec.name.startswith("prefix_key") for spec in layout.tensors) == len(stages)
    sets = [
        pack(
            prompts,
            model.head,
            TaskCard(name=name, labels=tuple("wxyz"), method="e2vpt", backbone=backbone, preprocessing=settings),
            layout,
            trunk,
        )
        for name, prompts, model in zip("abc", compiled, models, strict=True)
    ]
    table = Table.of(sets)
    graph = SwitchableGraph(trunk, settings, layout, dtype=torch.float32, opset=20)
    save_model(build_switchable(graph, settings, layout, opset=20), tmp_path / "zoo.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "zoo.onnx", providers=["CPUExecutionProvider"])
    pixels, slots = random_pixels(vit, 4), np.array([2, 0, 1, 0], dtype=np.int32)
    logits = session.run(None, {"image": pixels, "slot": slots, **table.arrays})[0]
    for row, slot in enumerate(slots):
        expected = expected_logits(models[slot], pixels[row : row + 1])
        assert difference(logits[row : row + 1, :4], expected) < CLOSE


def test_a_hierarchy_is_refused_for_adaptive_layouts():
    vit = architectures.make("Swin-T")
    model = architectures.with_prompts(vit)
    backbone = BackboneId(name="swin", sha256="0" * 64, depth=5, width=384, heads=24, patch_size=4)
    with pytest.raises(SpecError, match="--layout superset: swin has no patch grid shared by all blocks; use prefix"):
        choose_layout({"a": compile_prompts(model)}, backbone, model.trunk, precision="fp32", family="superset")


def test_half_precision_keeps_windows_and_angles():
    for case in ("Swin-T", "DINOv3"):
        model = architectures.with_prompts(architectures.make(case))
        settings, pixels = architectures.preprocessing_of(model.vit), random_pixels(model.vit)
        graph = FoldedGraph(
            model.trunk,
            settings,
            compile_prompts(model),
            model.head,
            dtype=torch.float16,
            image_input="uint8",
            opset=20,
        )
        with torch.no_grad():
            found = graph(torch.from_numpy(pixels)).numpy()
        assert difference(found, expected_logits(model, pixels)) < 5e-2


def test_a_family_without_a_graph_is_refused_by_name():
    class Other(type(trunk_of(architectures.make("ViT-Ti/16")))):
        pass

    vit = architectures.make("ViT-Ti/16")
    with pytest.raises(ExportError, match="no deployed graph is written for backbones of VisionTransformer"):
        graph_parts(Other(vit), architectures.preprocessing_of(vit), image_input="uint8", fused=False)
