"""VAPT (arXiv 2501.18936): prompts made from the image by small generators, one for each block but the first."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpdeploy.errors import SpecError
from vpdeploy_train.methods.kept import Kept, PrunableMethod
from vpdeploy_train.methods.method import Generator, PromptDimensions, stored_count
from vpdeploy_train.methods.options import PROMPT_RATES, DeepOptions, Rates
from vpdeploy_train.option import between, option

if TYPE_CHECKING:
    from typing_extensions import Self

    from vpdeploy_train.trunks import Trunk

PromptNorm = Literal["block", "paper"]
PromptStart = Literal["apart", "zero"]

PAPER_EPS = 1e-5
"""Of the LayerNorm before each generator, in the paper's code."""

_APART = 0.1


class VAPT(PrunableMethod):
    """Static prompts P0 (T, D) in block 0, adaptive ones in the others.

    For block i >= 1, from its input patches X (n, D), without class token and registers (paper, section 4):

        X1 = LN_i(X)
        G = linear_i(conv_i(X1)): one K×K kernel shared by all channels, then n' = (g-K+1)² positions to T tokens
        prompts = G + W2 relu(W1 G): one projector shared by all blocks, r hidden units

    Convolution and linear act on positions, dropout2d (whole channels) on channels, so the two maps are multiplied into
    one matrix A (T, n) before they meet the image, in training as in deployment:

        G = m ⊙ (A X1) + b, A = conv_i's transpose of linear_i's weight, m the channel dropout

    Initial values: P0 as VPT; kernels N(0, 1); LayerNorms 1 and 0; W1 and W2 kaiming-uniform as ``torch.nn.Linear``;
    linears' biases zero and their weights N(0, 0.01 / n'). In the paper these weights are zero too (``apart=False``):
    then every adaptive prompt is zero at first, all tokens of a block have the same gradient, and they stay copies of
    one another but for the noise that dropout brings.

    Args:
        dimensions: Sizes taken from the backbone; all blocks must share one patch grid.
        kept: Which prompt tokens and hidden units there are.
        kernel: Side of the convolution's kernel, K.
        eps: Of LN_i; the block's own value lets deployment normalise once for both, the paper's is 1e-5.
        dropout: Of P0's entries, of G's channels and of the hidden units, while training.
        apart: Tokens start a little apart from each other, or as the paper's zeros.
        generator: Source of the initial values.

    Raises:
        SpecError: The backbone has no patch grid shared by all blocks, or one smaller than the kernel.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(DeepOptions):
        """What a user can choose; ``prompt_dropout`` acts on channels and hidden units, too."""

        vapt_hidden: int = option(8, "hidden units of the feature projector", limits=between(1, 4096))
        vapt_kernel: int = option(2, "side of the convolution kernel", limits=between(1, 32))
        vapt_norm: PromptNorm = option("block", "LayerNorm eps: the block's, shared at run time, or 1e-5")
        vapt_start: PromptStart = option("apart", "tokens begin a little apart, or at zero (the paper)")

    form = "adaptive"
    parts = frozenset({"tokens", "hidden"})
    rates = Rates(sgd=PROMPT_RATES.sgd, adamw=0.1)

    def __init__(
        self,
        dimensions: PromptDimensions,
        kept: Kept,
        *,
        kernel: int = 2,
        eps: float = PAPER_EPS,
        dropout: float = 0.1,
        apart: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        grid = dimensions.grid
        if grid is None:
            raise SpecError("method 'vapt' needs a backbone whose blocks share one patch grid; use e2vpt or vpt-deep")
        if grid < kernel:
            raise SpecError(f"method 'vapt': a kernel of {kernel} does not fit a grid of {grid}x{grid} patches")
        self.dimensions = dimensions
        self.kept = kept
        self.grid = grid
        self.kernel = kernel
        self.eps = eps
        self.dropout = dropout
        width, adaptive = dimensions.blocks[0].width, kept.tokens[1:]
        positions, hidden = (grid - kernel + 1) ** 2, len(kept.hidden)

        def uniform(shape: tuple[int, ...], bound: float) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound, generator=generator))

        bound = math.sqrt(6 / (3 * dimensions.patch_size**2 + width))
        self.first = uniform((len(kept.tokens[0]), width), bound)
        self.norm_weight = nn.ParameterList([torch.ones(width) for _ in adaptive])
        self.norm_bias = nn.ParameterList([torch.zeros(width) for _ in adaptive])
        self.kernels = nn.ParameterList([torch.empty(kernel, kernel).normal_(generator=generator) for _ in adaptive])
        spread = _APART / math.sqrt(positions) if apart else 0.0
        self.linear_weight = nn.ParameterList(
            [torch.empty(len(block), positions).normal_(generator=generator) * spread for block in adaptive]
        )
        self.linear_bias = nn.ParameterList([torch.zeros(len(block)) for block in adaptive])
        self.down = uniform((hidden, width), 1 / math.sqrt(width))
        self.up = uniform((width, hidden), 1 / math.sqrt(max(hidden, 1)))

    @classmethod
    def create(cls, dimensions: PromptDimensions, options: Options, generator: torch.Generator) -> Self:
        """Return fresh prompts of the lengths chosen."""
        shared = dimensions.norm_eps if options.vapt_norm == "block" else None
        return cls(
            dimensions,
            Kept.everything(dimensions.depth, options.prompt_tokens, 0, options.vapt_hidden),
            kernel=options.vapt_kernel,
            eps=PAPER_EPS if shared is None else shared,
            dropout=options.prompt_dropout,
            apart=options.vapt_start == "apart",
            generator=generator,
        )

    @classmethod
    def restore(cls, dimensions: PromptDimensions, structure: dict[str, Any]) -> Self:
        """Return prompts of a stored ``structure``; its complaints are ``PromptMethod.restore``'s."""
        kept = Kept.from_fields(structure["kept"])
        kept.check_depth(dimensions.depth)
        grid = structure["grid"]
        if grid != dimensions.grid:
            raise ValueError(
                f"the prompts were learned on a grid of {grid}x{grid} patches, the backbone has {dimensions.grid}: "
                "adaptive prompts cannot change the image size"
            )
        kernel, eps = stored_count(structure, "kernel", least=1, most=grid), float(structure["eps"])
        if not (math.isfinite(eps) and eps > 0):
            raise ValueError(f"eps is {eps}, a positive number expected")
        return cls(dimensions, kept, kernel=kernel, eps=eps)

    def prompts(self, index: int, trunk: Trunk, tokens: Tensor) -> Tensor | None:
        """Return block ``index``'s prompts: [T, D] for block 0, [B, T, D] for the others."""
        if not self.kept.tokens[index]:
            return None
        if index == 0:
            prompts = F.dropout(self.first, self.dropout, training=self.training)
        else:
            prompts = self._adapted(index - 1, trunk.patches(tokens))
        if self.masks is not None:
            prompts = prompts * self.masks.tokens[index][:, None]
        return prompts

    def generator(self, index: int, trunk: Trunk) -> Generator | None:
        """Return block ``index``'s generator, all of it multiplied out that does not depend on the image."""
        if index == 0 or not self.kept.tokens[index]:
            return None
        block = index - 1
        mix = self.mix(block)
        bias: Tensor = self.linear_bias[block]
        return Generator(
            mix=mix,
            scale=self.norm_weight[block],
            shift=mix.sum(1, keepdim=True) * self.norm_bias[block] + bias[:, None],
            down=self.down,
            up=self.up,
            eps=self.eps,
        )

    def mix(self, block: int) -> Tensor:
        """Return adaptive block ``block``'s convolution and token projector as one matrix, [T, n]."""
        side = self.grid - self.kernel + 1
        positions = self.linear_weight[block].view(-1, 1, side, side)
        kernel = self.kernels[block].view(1, 1, self.kernel, self.kernel)
        return F.conv_transpose2d(positions, kernel).flatten(1)

    def pruned_to(self, kept: Kept, state: dict[str, Tensor]) -> Self:
        """Return a smaller method: rows of P0 and of the token projectors, hidden units of the feature projector."""
        smaller = type(self)(self.dimensions, kept, kernel=self.kernel, eps=self.eps, dropout=self.dropout)
        rows = [
            [mine.index(token) for token in theirs] for mine, theirs in zip(self.kept.tokens, kept.tokens, strict=True)
        ]
        hidden = [self.kept.hidden.index(unit) for unit in kept.hidden]
        gathered = dict(state)
        gathered["first"] = state["first"][rows[0]]
        gathered["down"], gathered["up"] = state["down"][hidden], state["up"][:, hidden]
        for block, kept_rows in enumerate(rows[1:]):
            for name in (f"linear_weight.{block}", f"linear_bias.{block}"):
                gathered[name] = state[name][kept_rows]
        smaller.load_state_dict({name: value.clone() for name, value in gathered.items()}, strict=True)
        return smaller

    def structure(self) -> dict[str, Any]:
        """Return kept indices and options, JSON-ready."""
        return {"kept": self.kept.to_fields(), "kernel": self.kernel, "eps": self.eps, "grid": self.grid}

    def summary(self) -> dict[str, Any]:
        """Return counts of what was kept, JSON-ready; ``parameters`` counts all that is trained."""
        return {
            "tokens_per_block": [len(block) for block in self.kept.tokens],
            "hidden": len(self.kept.hidden),
            "parameters": sum(parameter.numel() for parameter in self.parameters()),
        }

    def _adapted(self, block: int, patches: Tensor) -> Tensor:
        """Return one block's adaptive prompts, [B, T, D], from its input patches [B, n, D]."""
        normalised = F.layer_norm(patches, patches.shape[-1:], self.norm_weight[block], self.norm_bias[block], self.eps)
        mixed = self.mix(block) @ normalised
        # Dropout2d before the token projector drops whole channels; it commutes with maps over positions.
        channels = F.dropout(torch.ones_like(mixed[:, :1]), self.dropout, training=self.training)
        tokens: Tensor = mixed * channels + self.linear_bias[block][:, None]
        hidden = F.dropout(F.relu(tokens @ self.down.T), self.dropout, training=self.training)
        if self.masks is not None:
            hidden = hidden * self.masks.hidden
        return tokens + hidden @ self.up.T
