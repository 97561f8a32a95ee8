"""The pruning search: candidates, and the choice among them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from vpdeploy_train.methods.kept import Kept
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.pruning import selection
from vpdeploy_train.pruning.scores import Scores, prunable_method, score_prompts
from vpdeploy_train.settings import PruneMode, PruneScope
from vpdeploy_train.shares import Shares
from vpdeploy_train.state import EpochRow

_ROUNDING = 1e-12


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One prompt set the search may choose.

    Attributes:
        phase: The phase that trains it.
        model: The model.
        shares: What it was allowed to keep.
        parameters: The papers' count: trained numbers, less those of pruned segments.
        start: The validation results of its start; None where it was not validated.
        best: Its best epoch so far; of one that is finished that may be its start, epoch 0.
        epochs: How many epochs it was trained.
        finished: Whether these were all; only a finished candidate can be chosen.
    """

    phase: str
    model: PromptedViT = field(repr=False)
    shares: Shares
    parameters: int
    start: EpochRow | None
    best: EpochRow
    epochs: int
    finished: bool


def kept_for(
    model: PromptedViT,
    scores: Scores,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    shares: Shares,
    scope: PruneScope,
    mode: PruneMode = "remove",
    prune_kv: bool = True,
) -> Kept:
    """Decide what to keep of a trained model: tokens first, then segments of what remains, by scores of their own.

    Args:
        model: The trained, unpruned model.
        scores: The scores of its prompts.
        batches: Training images to score segments on: normalised [B, 3, H, W] and labels [B].
        shares: How much to keep.
        scope: ``layer`` or ``shared``.
        mode: Pruned visual prompts are removed, or stay as zero vectors; key/value prompts are always removed.
        prune_kv: Whether key/value prompts are pruned.
    """
    # Tokens, key/value prompts and hidden units: by scores of the whole prompt set.
    method = prunable_method(model)
    select = selection.keep_tokens if mode == "remove" else selection.zero_tokens
    kept = select(method.kept, scores, shares.tokens)
    if prune_kv:
        kept = selection.keep_kv_tokens(kept, scores, shares.tokens)
    if shares.hidden < 1:
        kept = selection.keep_hidden(kept, scores, shares.hidden)
    if shares.segments >= 1:
        return kept

    # Segments: by scores of what is left, for the removal of tokens has changed what each segment is worth.
    smaller = PromptedViT(
        model.vit,
        method.pruned_to(kept, method.state_dict()),
        model.head.out_features,
        pools_prompts=model.pools_prompts,
    )
    smaller.head.load_state_dict(model.head.state_dict())
    smaller.to(model.head.weight.device)
    return selection.keep_segments(kept, score_prompts(smaller, batches, scope=scope), shares.segments)


def rank(candidates: Iterable[Candidate], *, slack: float, reference: float) -> list[Candidate]:
    """Order candidates as the search prefers them, on validation.

    First those whose accuracy is within ``slack`` of the best: the smaller prompt set, then the more accurate, then
    the one with the lower loss; behind them the others, the more accurate first.

    Args:
        candidates: Candidates that were trained equally far.
        slack: Accuracy that a smaller set may cost.
        reference: An accuracy reached elsewhere, which also counts as the best.
    """
    found = list(candidates)
    bar = max([reference, *(each.best.val_accuracy for each in found)]) - slack - _ROUNDING

    def key(each: Candidate) -> tuple[float, ...]:
        accuracy, loss = each.best.val_accuracy, each.best.val_loss
        return (0, each.parameters, -accuracy, loss) if accuracy >= bar else (1, -accuracy, loss, each.parameters)

    return sorted(found, key=key)


def choose(candidates: Iterable[Candidate], *, slack: float) -> Candidate:
    """Choose on validation: the smallest finished prompt set whose accuracy is within ``slack`` of the best."""
    return rank([each for each in candidates if each.finished], slack=slack, reference=0.0)[0]
