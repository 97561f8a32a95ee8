"""The end of the backbone: from the last block's tokens to the pooled feature."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

_UNUSED = ("patch_embed", "pos_embed", "cls_token", "reg_token", "rope")


class Pooling(nn.Module):
    """Runs the final norm and the pooling, by the backbone's own parts.

    Args:
        model: The frozen backbone, a ``VisionTransformer`` or an ``Eva``; its parts are copied.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        # The blocks are left behind: only the parts after them are used and exported.
        blocks, model.blocks = model.blocks, nn.ModuleList()
        try:
            self.model = copy.deepcopy(model)
        finally:
            model.blocks = blocks
        for name in _UNUSED:
            if isinstance(getattr(self.model, name, None), (nn.Module, nn.Parameter)):
                delattr(self.model, name)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the feature, [B, D], of tokens [B, N, D]."""
        feature: Tensor = self.model.forward_head(self.model.norm(tokens), pre_logits=True)
        return feature
