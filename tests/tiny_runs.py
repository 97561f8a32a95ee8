"""Runs without training: a tiny random vision transformer, random prompts and heads, written as training writes them.

Needs torch and timm; import it inside a fixture or from tests/export only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from vpdeploy.format.graphfacts import Precision
from vpdeploy.format.layout import Family
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy.format.promptset import CompiledPromptSet
from vpdeploy.format.task import TaskCard
from vpdeploy_export.compilation import compile_prompts
from vpdeploy_export.packing import choose_layout, pack
from vpdeploy_train.backbone import Backbone, load_backbone
from vpdeploy_train.methods import METHODS, MethodOptions
from vpdeploy_train.methods.e2vpt import E2VPT
from vpdeploy_train.methods.kept import SEGMENTS, Kept
from vpdeploy_train.methods.method import NoPrompts, PromptDimensions, PromptMethod
from vpdeploy_train.option import options_of
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.run import Run
from vpdeploy_train.settings import PoolingChoice
from vpdeploy_train.trunks import trunk_of

NAME = "vit_fixture_patch8_32"
SIDE, PATCH, WIDTH, DEPTH, HEADS = 32, 8, 48, 3, 3
PATCHES = (SIDE // PATCH) ** 2
TOKENS = PATCHES + 1
PREPROCESSING = Preprocessing(
    image_size=SIDE,
    resize="squash",
    crop_ratio=1.0,
    interpolation="bilinear",
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.25, 0.3),
)

# timm looks this table up by its name, in the module of the entry point that is being registered.
default_cfgs = generate_default_cfgs(
    {NAME: {"num_classes": 0, "input_size": (3, SIDE, SIDE), "mean": PREPROCESSING.mean, "std": PREPROCESSING.std}}
)


def vit_fixture_patch8_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    architecture = {
        "img_size": SIDE,
        "patch_size": PATCH,
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
        "mlp_ratio": 2,
        "num_classes": 0,
    }
    return build_model_with_cfg(
        VisionTransformer,
        NAME,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        **{**architecture, **kwargs},
    )


register_model(vit_fixture_patch8_32)


def randomise(vit: VisionTransformer, seed: int) -> VisionTransformer:
    """Give every parameter a value that matters: a fresh timm model has zero biases and near-uniform attention."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_gain = parameter.dim() == 1 and name.endswith("weight")
            scale = 1.0 if name in ("pos_embed", "cls_token", "reg_token") else 0.15
            parameter.copy_(1 + 0.2 * noise if is_gain else scale * noise)
    return vit.eval().requires_grad_(False)


def write_weights(path: Path, *, seed: int = 0) -> Path:
    """Write the state dict of a random backbone; bundles on one backbone share their traces."""
    safetensors.torch.save_file(randomise(vit_fixture_patch8_32(), seed).state_dict(), path)
    return path


def backbone_of(weights: Path) -> Backbone:
    return load_backbone(NAME, weights=weights, image_size=SIDE)


def ragged_kept(tokens: list[list[int]], kv_tokens: list[list[int]]) -> Kept:
    """Kept indices as pruning leaves them; the first segment of every kept token is pruned."""
    row = (False,) + (True,) * (SEGMENTS - 1)
    return Kept(
        tokens=tuple(map(tuple, tokens)),
        kv_tokens=tuple(map(tuple, kv_tokens)),
        segments=tuple((row,) * len(block) for block in tokens),
    )


def e2vpt(dimensions: PromptDimensions, kept: Kept, *, kv_shared: bool = True, seed: int = 0) -> E2VPT:
    """Prompts of unit scale: as strong as tokens."""
    method = E2VPT(dimensions, kept, kv_shared=kv_shared)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return method.eval()


def dimensions_of(vit: VisionTransformer) -> PromptDimensions:
    return PromptDimensions.of(trunk_of(vit))


def prompted(vit: VisionTransformer, method: PromptMethod, classes: int, *, seed: int = 0) -> PromptedViT:
    """A model as if trained: the head is random too."""
    model = PromptedViT(vit, method, classes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def compiled_set(
    model: PromptedViT, card: TaskCard, *, precision: Precision = "fp32", family: Family | None = None
) -> CompiledPromptSet:
    """A model as a bundle of its own would hold it."""
    prompts = compile_prompts(model)
    layout = choose_layout({card.name: prompts}, card.backbone, model.trunk, precision=precision, family=family)
    return pack(prompts, model.head, card, layout, model.trunk)


def options_for(method: str, **values: Any) -> MethodOptions:
    """A method's options: of some values, those that it knows."""
    kind = METHODS[method].Options
    return kind(**{name: value for name, value in values.items() if name in options_of(kind)})


def random_method(vit: VisionTransformer, name: str, *, seed: int = 0, **options: Any) -> PromptMethod:
    """A method by name, random in every tensor, so that each of them matters."""
    dimensions = PromptDimensions.of(trunk_of(vit))
    generator = torch.Generator().manual_seed(seed)
    method = METHODS[name].create(dimensions, options_for(name, **options), generator)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return method.eval()


def write_run(
    path: Path,
    weights: Path,
    *,
    name: str,
    classes: int,
    kept: Kept | None,
    method: str = "e2vpt",
    kv_shared: bool = True,
    seed: int = 0,
    preprocessing: Preprocessing = PREPROCESSING,
    data: str = "/nowhere/images",
    image_size: int = SIDE,
) -> Run:
    """Write a run folder of E²VPT prompts; ``kept=None`` is a run without prompts."""
    backbone = load_backbone(NAME, weights=weights, image_size=image_size)
    prompts: PromptMethod = NoPrompts()
    if kept is not None:
        prompts = e2vpt(PromptDimensions.of(backbone.trunk), kept, kv_shared=kv_shared, seed=seed)
    model = prompted(backbone.vit, prompts, classes, seed=seed + 1)
    return write_model(
        path, model, backbone, name=name, method=method, weights=weights, preprocessing=preprocessing, data=data
    )


def write_model(
    path: Path,
    model: PromptedViT,
    backbone: Backbone,
    *,
    name: str,
    method: str,
    weights: Path,
    preprocessing: Preprocessing = PREPROCESSING,
    data: str = "/nowhere/images",
    pooling: PoolingChoice = "model",
) -> Run:
    """Write a model as training writes it."""
    assert method in METHODS
    prompts, classes = model.method, model.head.out_features
    run = Run(
        path=path,
        card=TaskCard(
            name=name,
            labels=tuple(f"{name}-{index}" for index in range(classes)),
            method=method,
            backbone=backbone.identity,
            preprocessing=preprocessing,
            details={"metrics": {"val_accuracy": 0.5}, "prompts": prompts.summary(), "pruning": None},
        ),
        structure=prompts.structure(),
        state=model.trained_state(),
        data=data,
        data_seed=0,
        val_fraction=0.2,
        weights=str(weights),
        pooling=pooling,
    )
    run.write()
    return run


def write_runs(folder: Path, weights: Path) -> dict[str, Path]:
    """Write three runs whose prompt and class counts differ: ragged and pruned, VPT-deep, and none at all."""
    ragged = ragged_kept([[0, 3, 7], [], [1]], [[0, 2], [4], [1, 3]])
    write_run(folder / "flowers", weights, name="flowers", classes=4, kept=ragged, seed=10)
    write_run(
        folder / "birds",
        weights,
        name="birds",
        classes=7,
        kept=Kept.everything(DEPTH, 10, 0),
        method="vpt-deep",
        seed=20,
    )
    write_run(folder / "probe", weights, name="probe", classes=2, kept=None, method="linear", seed=30)
    return {name: folder / name for name in ("flowers", "birds", "probe")}


def write_mixed_runs(folder: Path) -> list[Path]:
    """Write runs of three methods on one backbone: E²VPT, VAPT and a linear head; 3, 4 and 5 classes."""
    weights = write_weights(folder / "vit.safetensors")
    backbone = backbone_of(weights)
    options = {"prompt_tokens": 5, "kv_tokens": 3, "vapt_hidden": 4, "lora_rank": 3, "vapt_norm": "block"}
    for number, name in enumerate(("e2vpt", "vapt", "linear")):
        method = random_method(backbone.vit, name, seed=number, **options)
        model = prompted(backbone.vit, method, 3 + number, seed=number)
        write_model(folder / name, model, backbone, name=name, method=name, weights=weights)
    return [folder / name for name in ("e2vpt", "vapt", "linear")]
