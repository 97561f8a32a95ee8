"""What backbones have in common whose tokens are rows of one width: class token, registers and a grid of patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import PatchEmbed
from torch import Tensor, nn

from vpdeploy.format.task import Stage
from vpdeploy_train.trunks.trunk import Trunk


class RowTrunk(Trunk):
    """Tokens [B, N, D]: class token and registers where there are any, then the patches, row by row of the image."""

    @classmethod
    def refusal_of_rows(cls, model: Any) -> str | None:
        """Say what of a model is no sequence of square patches with heads of width D / H; None if all is."""
        embedding = model.patch_embed
        if type(embedding) is not PatchEmbed:
            return f"its patches come from a {type(embedding).__name__}, not from one projection"
        if len({*embedding.patch_size}) > 1 or len({*(embedding.img_size or ())}) > 1:
            return f"its patches or images are not square ({embedding.patch_size}, {embedding.img_size})"
        for block in model.blocks:
            attention = block.attn
            if attention.num_heads * attention.head_dim != model.embed_dim:
                return (
                    f"its {attention.num_heads} heads of {attention.head_dim} are not {model.embed_dim} wide together"
                )
            if getattr(attention, "gate", None) is not None:
                return "its attention is gated"
        return None

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The L blocks."""
        return list(self.model.blocks)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages: all blocks form one."""
        heads = self.model.blocks[0].attn.num_heads
        return (Stage(depth=len(self.model.blocks), width=self.model.embed_dim, heads=heads),)

    @property
    def reads_class_token_only(self) -> bool:
        """Whether the feature is the class token's row alone."""
        model = self.model
        return model.global_pool == "token" and model.attn_pool is None and model.cls_token is not None

    @property
    def averages_rows(self) -> bool:
        """Whether the feature is the mean over all rows behind class token and registers."""
        return self.model.global_pool == "avg" and self.model.attn_pool is None

    def pool(self, tokens: Tensor) -> Tensor:
        """Return the pooled feature, [B, D], as timm does."""
        feature: Tensor = self.model.forward_head(self.model.norm(tokens), pre_logits=True)
        return feature

    @property
    def grid(self) -> int:
        """The number of patches along a side."""
        return self.image_size // self.patch_size

    def patches(self, tokens: Tensor) -> Tensor:
        """Return the rows of the patches, [B, n, D]."""
        first = self.model.num_prefix_tokens
        return tokens[:, first : first + self.grid**2]

    def norm(self, index: int) -> nn.Module:
        """Return block ``index``'s pre-attention norm."""
        norm: nn.Module = self.model.blocks[index].norm1
        return norm
