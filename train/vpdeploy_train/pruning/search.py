"""The pruning search: candidates, the choice among them, and the report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vpdeploy_train.methods.e2vpt import Kept
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.pruning.scores import Scores, prunable_method, score_prompts
from vpdeploy_train.pruning.selection import keep_segments as select_segments
from vpdeploy_train.pruning.selection import keep_tokens as select_tokens
from vpdeploy_train.settings import PruneScope
from vpdeploy_train.state import EpochRow

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One trained prompt set the search may choose.

    Attributes:
        phase: The phase that trained it.
        model: The trained model.
        best: Its best epoch.
        keep: Share of tokens it was allowed.
        keep_segments: Share of segments it was allowed.
        parameters: The paper's count: prompts without pruned segments.
    """

    phase: str
    model: PromptedViT = field(repr=False)
    best: EpochRow
    keep: float
    keep_segments: float
    parameters: int

    @classmethod
    def of(cls, phase: str, model: PromptedViT, best: EpochRow, *, keep: float, keep_segments: float) -> Candidate:
        """Return a candidate, its parameters counted."""
        parameters = int(model.method.summary()["parameters"])
        return cls(phase=phase, model=model, best=best, keep=keep, keep_segments=keep_segments, parameters=parameters)


@dataclass(frozen=True, kw_only=True)
class PruningReport:
    """What the search did.

    Attributes:
        candidates: One row for each: phase, shares, parameters, validation accuracy and loss.
        chosen: Phase of the chosen one.
        scope: ``layer`` or ``shared``.
        token_scores: Importance before pruning, for each block and visual prompt.
        kv_scores: Importance before pruning, for each block and key/value prompt.
        kept: What the chosen one keeps, by original index.
    """

    candidates: list[dict[str, Any]]
    chosen: str
    scope: PruneScope
    token_scores: list[list[float]]
    kv_scores: list[list[float]]
    kept: Kept

    def to_fields(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "chosen": self.chosen,
            "scope": self.scope,
            "candidates": self.candidates,
            "kept": self.kept.to_fields(),
            "token_scores": self.token_scores,
            "kv_scores": self.kv_scores,
        }


def kept_for(
    model: PromptedViT, scores: Scores, batches: Batches, *, keep: float, keep_segments: float, scope: PruneScope
) -> Kept:
    """Decide what to keep of a trained model: tokens first, then segments of what remains, by scores of their own.

    Args:
        model: The trained, unpruned model.
        scores: Its scores.
        batches: Training images to score segments on: normalised [B, 3, H, W] and labels [B].
        keep: Share of visual and of key/value prompts.
        keep_segments: Share of each remaining token's segments.
        scope: ``layer`` or ``shared``.
    """
    method = prunable_method(model)
    kept = select_tokens(method.kept, scores, keep)
    if keep_segments >= 1:
        return kept
    smaller = PromptedViT(model.vit, method.pruned_to(kept, method.state_dict()), model.head.out_features)
    smaller.head.load_state_dict(model.head.state_dict())
    smaller.to(model.head.weight.device)
    return select_segments(kept, score_prompts(smaller, batches, scope=scope), keep_segments)


def choose(candidates: list[Candidate], *, slack: float) -> Candidate:
    """Choose on validation: the smallest prompt set whose accuracy is within ``slack`` of the best.

    Of equally small ones the more accurate is taken, then the one with the lower loss.
    """
    best = max(candidate.best.val_accuracy for candidate in candidates)
    eligible = [candidate for candidate in candidates if candidate.best.val_accuracy >= best - slack - 1e-12]
    return min(eligible, key=lambda each: (each.parameters, -each.best.val_accuracy, each.best.val_loss))


def report_of(candidates: list[Candidate], chosen: Candidate, scores: Scores, *, scope: PruneScope) -> PruningReport:
    """Return the report of a finished search; ``scores`` are those of the unpruned model."""
    return PruningReport(
        candidates=[
            {
                "phase": candidate.phase,
                "keep": candidate.keep,
                "keep_segments": candidate.keep_segments,
                "parameters": candidate.parameters,
                "val_accuracy": candidate.best.val_accuracy,
                "val_loss": candidate.best.val_loss,
            }
            for candidate in candidates
        ],
        chosen=chosen.phase,
        scope=scope,
        token_scores=[block.tolist() for block in scores.tokens],
        kv_scores=[block.tolist() for block in scores.kv_tokens],
        kept=prunable_method(chosen.model).kept,
    )
