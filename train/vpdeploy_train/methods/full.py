"""Full fine-tuning: every weight of a copy of the backbone is trained; the upper baseline, without prompts."""

from __future__ import annotations

import copy

from torch import nn

from vpdeploy_train.methods.method import PromptMethod
from vpdeploy_train.methods.options import Rates


class FullFineTuning(PromptMethod):
    """Owns a copy of the backbone from ``adapt`` on; its tensors are the run's, some hundred megabytes for a ViT-B."""

    form = "weights"
    rates = Rates(sgd=0.01, adamw=4e-4)
    settles_head = False

    def __init__(self) -> None:
        super().__init__()
        self.backbone: nn.Module | None = None

    def adapt(self, model: nn.Module) -> nn.Module:
        """Return a trainable copy of the backbone, which is this method's from now on."""
        self.backbone = copy.deepcopy(model).requires_grad_(True)
        return self.backbone
