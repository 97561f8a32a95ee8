"""Models of deployed size with random weights, on which time does not depend, and what is measured of them."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from benchmarks.tokens import TokenPromptedViT, build_token_prompted
from vpdeploy.bench.deployed import DeployedSubject
from vpdeploy.bench.foreign import ForeignSubject
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy.format.task import BackboneId, TaskCard
from vpdeploy_export import TrainedModel
from vpdeploy_export.onnx.save import save_model
from vpdeploy_train.methods.e2vpt import E2VPT
from vpdeploy_train.methods.kept import Kept
from vpdeploy_train.methods.method import PromptDimensions
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.trunks import trunk_of

CLASSES = 100
RUNTIME = "onnxruntime-cpu"


def random_vit(name: str) -> VisionTransformer:
    """A backbone whose biases are not zero: exporters drop what adds nothing."""
    vit = timm.create_model(name, pretrained=False, num_classes=0).eval().requires_grad_(False)
    for parameter in vit.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return vit


def prompted_model(vit: nn.Module, prompts: int) -> PromptedViT:
    dimensions = PromptDimensions.of(trunk_of(vit))
    return PromptedViT(vit, E2VPT(dimensions, Kept.everything(dimensions.depth, prompts, 0), dropout=0.0), CLASSES)


def preprocessing_of(vit: nn.Module) -> Preprocessing:
    return Preprocessing(image_size=trunk_of(vit).image_size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def trained(model: PromptedViT, name: str, *, method: str = "vpt-deep", backbone: str = "random") -> TrainedModel:
    """A model as an export takes it."""
    stage = model.trunk.stages[0]
    identity = BackboneId(
        name=backbone,
        sha256="0" * 64,
        depth=stage.depth,
        width=stage.width,
        heads=stage.heads,
        patch_size=model.trunk.patch_size,
    )
    card = TaskCard(
        name=name,
        labels=tuple(map(str, range(CLASSES))),
        method=method,
        backbone=identity,
        preprocessing=preprocessing_of(model.vit),
    )
    return TrainedModel.of_model(model, card)


def deployed(path: Path, *, threads: int, tasks: int | None = None) -> DeployedSubject:
    return DeployedSubject(Artifact.open(path), name=path.name, runtime=RUNTIME, threads=threads, tasks=tasks)


def yardstick(path: Path, model: TokenPromptedViT, size: int, *, opset: int, threads: int) -> ForeignSubject:
    """The plain model, or prompts as tokens, as other tools would export it."""
    save_model(build_token_prompted(model, size, opset=opset), path)
    return ForeignSubject(path, name=path.name, runtime=RUNTIME, threads=threads)
