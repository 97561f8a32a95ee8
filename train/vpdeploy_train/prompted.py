"""The prompted vision transformer: a frozen backbone, one prompt method and a linear head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vpdeploy.errors import SpecError
from vpdeploy_train.methods.method import PromptMethod
from vpdeploy_train.trunks import Prefix, Trunk, trunk_of


class PromptedViT(nn.Module):
    """A frozen timm ViT whose blocks attend to the prompts of a method.

    Prompts enter as keys and values only, because every block discards their outputs; with CLS pooling the last block
    computes the class token's row only. Both are exact. Without prompts, the features equal timm's own forward.

    Args:
        vit: The backbone, created with ``num_classes=0``; it stays in eval mode.
        method: The prompts, which are trained.
        classes: Number of classes, C.
        pools_prompts: The pooled feature averages over the last block's prompt rows too, as published for backbones
            without class token pooling; otherwise over the image's own rows.

    Raises:
        SpecError: ``pools_prompts`` and the backbone does not average over rows, or prompts cannot enter it.
    """

    def __init__(self, vit: nn.Module, method: PromptMethod, classes: int, *, pools_prompts: bool = False) -> None:
        super().__init__()
        self.vit = method.adapt(vit)
        self.trunk: Trunk = trunk_of(self.vit)
        self.method = method
        self.pools_prompts = pools_prompts
        if pools_prompts and not self.trunk.averages_rows:
            raise SpecError("--pooling published: this backbone's feature does not average over tokens; use 'model'")
        self.head = nn.Linear(self.trunk.feature_width, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.train(self.training)

    def train(self, mode: bool = True) -> PromptedViT:
        """Switch prompts and head between training and evaluation; the backbone stays in eval mode."""
        super().train(mode)
        self.vit.eval()
        return self

    def features(self, pixels: Tensor) -> Tensor:
        """Compute the pooled feature.

        Args:
            pixels: Normalised images, [B, 3, H, W].

        Returns:
            [B, D].
        """
        # Patches, and what the method adds as tokens: [B, N, D].
        tokens = self.trunk.embed(pixels)
        own_rows = tokens.shape[1]
        inserted = self.method.inserted()
        if inserted is not None:
            tokens = _append(tokens, inserted)

        # All blocks but the last, each with its own prefix.
        last = len(self.trunk.blocks) - 1
        for index in range(last):
            tokens = self.trunk.enter(index, tokens)
            tokens = self.trunk.run(index, tokens, self.prefix(index, tokens))

        # The last block, of which only what the feature reads is computed; published pooling reads prompt rows too.
        tokens = self.trunk.enter(last, tokens)
        rows = self.method.prompts(last, self.trunk, tokens) if self.pools_prompts else None
        prefix = self.prefix(last, tokens, projects=rows is None)
        if rows is not None:
            tokens = _append(tokens, rows)
        tokens = self.trunk.run(last, tokens, prefix, first_row_only=self.trunk.reads_class_token_only)
        return self.trunk.pool(tokens if self.pools_prompts else tokens[:, :own_rows])

    def prefix(self, index: int, tokens: Tensor, *, projects: bool = True) -> Prefix | None:
        """Return what block ``index`` attends to besides its tokens: key/value prompts, then projected visual prompts.

        Args:
            index: Block, 0 to L - 1.
            tokens: The block's input.
            projects: Whether visual prompts are part of it.
        """
        parts: list[tuple[Tensor, Tensor]] = []
        key_values = self.method.key_values(index)
        if key_values is not None:
            parts.append(key_values)
        prompts = self.method.prompts(index, self.trunk, tokens) if projects else None
        if prompts is not None:
            parts.append(self.trunk.project(index, prompts))
        if not parts:
            return None
        # Under autocast the projections are in half precision and the key/value prompts are not.
        dtype = parts[-1][0].dtype
        key, value = (_join([pair[side].to(dtype) for pair in parts]) for side in (0, 1))
        return Prefix(key=key, value=value)

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute logits, [B, C], from normalised images, [B, 3, H, W]."""
        logits: Tensor = self.head(self.features(pixels))
        return logits

    def trained_state(self) -> dict[str, Tensor]:
        """Return the trained tensors by name, prompts first, detached copies on the CPU."""
        state = {f"method.{name}": value for name, value in self.method.state_dict().items()}
        state |= {f"head.{name}": value for name, value in self.head.state_dict().items()}
        return {name: value.detach().to("cpu", copy=True) for name, value in state.items()}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Set the trained tensors from ``trained_state``'s form.

        Raises:
            RuntimeError: A tensor is missing or of another shape.
        """
        for prefix, module in (("method.", self.method), ("head.", self.head)):
            part = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            module.load_state_dict(part, strict=True)


def normalise_pixels(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Turn uint8 images [B, H, W, 3] into normalised float32 images [B, 3, H, W].

    Args:
        pixels: uint8 [B, H, W, 3].
        mean: Per-channel mean of pixels in [0, 1], [3].
        std: Per-channel standard deviation, [3].
    """
    scaled = (pixels.to(torch.float32) / 255.0 - mean) / std
    return scaled.permute(0, 3, 1, 2).contiguous()


def _append(tokens: Tensor, rows: Tensor) -> Tensor:
    """Append rows [T, D] or [B, T, D] to tokens [B, N, D]; their place among the tokens does not matter."""
    return torch.cat([tokens, rows.to(tokens.dtype).expand(tokens.shape[0], -1, -1)], dim=1)


def _join(parts: list[Tensor]) -> Tensor:
    """Join parts on the token axis; a part without a batch axis is repeated for each image of one that has it."""
    if len({part.dim() for part in parts}) > 1:
        batch = max(part.shape[0] for part in parts if part.dim() == 4)
        parts = [part.expand(batch, -1, -1, -1) for part in parts]
    return torch.cat(parts, dim=-2)
