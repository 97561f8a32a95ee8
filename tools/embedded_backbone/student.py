"""The student: how far it is from the teacher, and the file that becomes of it (stage 3)."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors.torch import load_file, save_file
from timm.layers.config import set_fused_attn
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from tools.embedded_backbone.features import PATCH_TARGETS
from vpdeploy_train.embedded import vit_mini_patch8_64


class Student(nn.Module):
    """The backbone and the two linear heads that distillation needs and the package does not get."""

    def __init__(self) -> None:
        """Start from timm's random initialisation."""
        super().__init__()
        # torch's fused attention on CPU takes half of a training step of this small model.
        set_fused_attn(False)
        self.backbone: VisionTransformer = vit_mini_patch8_64()
        self.token_head = nn.Linear(160, 384)
        self.patch_head = nn.Linear(160, PATCH_TARGETS)

    def measure_loss(self, images: Tensor, token: Tensor, patches: Tensor) -> Tensor:
        """Return how far the predictions from images (B, 3, 64, 64) are from both targets, one number.

        Args:
            images: (B, 3, 64, 64), float32, scaled to -1..1.
            token: the teacher's standardised class tokens, (B, 384).
            patches: the teacher's reduced patch tokens, (B, 64, 128).
        """
        tokens = self.backbone.forward_features(images)
        token_distance = measure_distance(self.token_head(tokens[:, 0]), token)
        return token_distance + measure_distance(self.patch_head(tokens[:, 1:]), patches)


def measure_distance(predicted: Tensor, target: Tensor) -> Tensor:
    """Smooth L1 plus one minus the cosine, over the last dimension: the size and the direction of the target."""
    cosine = functional.cosine_similarity(predicted.float(), target, dim=-1).mean()
    return functional.smooth_l1_loss(predicted.float(), target) + (1 - cosine)


def write_weights(backbone: nn.Module, path: Path) -> None:
    """Write the backbone's tensors as float16 under timm's names."""
    tensors = {name: tensor.half().contiguous() for name, tensor in backbone.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    # One entry only: safetensors writes several in random order, and the file's hash would change.
    save_file(tensors, path, metadata={"format": "pt"})
    print(f"{path.name}: {path.stat().st_size} bytes, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}")


def read_weights(path: Path) -> VisionTransformer:
    """Build the backbone with the tensors of a written file: what is measured is what is shipped."""
    backbone: VisionTransformer = vit_mini_patch8_64()
    backbone.load_state_dict(load_file(path))
    return backbone.eval()
