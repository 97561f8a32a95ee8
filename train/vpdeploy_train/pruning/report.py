"""What the pruning search did, as ``pruning.json`` tells it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vpdeploy_train.footprint import count_macs, prompt_bytes, tuned_percent
from vpdeploy_train.methods.kept import Kept
from vpdeploy_train.pruning.scores import Scores, prunable_method
from vpdeploy_train.pruning.search import Candidate
from vpdeploy_train.settings import PruneMode, PruneScope


@dataclass(frozen=True, kw_only=True)
class PruningReport:
    """What the search did.

    Attributes:
        candidates: One row for each, the unpruned first: ``phase``, shares, ``parameters`` (the paper's count),
            ``tuned_percent``, ``bytes`` of the stored prompts, ``macs`` of one image when deployed (null where not
            counted), validation results of the best epoch, ``epochs`` trained and whether it ``finished``.
        chosen: Phase of the chosen one.
        scope: ``layer`` or ``shared``.
        mode: ``remove`` or ``zero``.
        token_scores: Importance before pruning, for each block and visual prompt.
        kv_scores: Importance before pruning, for each block and key/value prompt.
        hidden_scores: Importance before pruning, for each hidden unit of a feature projector.
        kept: What the chosen one keeps, by original index.
        segmented: Whether the prompts have segments.
    """

    candidates: list[dict[str, Any]]
    chosen: str
    scope: PruneScope
    mode: PruneMode
    token_scores: list[list[float]]
    kv_scores: list[list[float]]
    hidden_scores: list[float]
    kept: Kept
    segmented: bool

    @property
    def before(self) -> dict[str, Any]:
        """The row of the unpruned prompts."""
        return self.candidates[0]

    @property
    def after(self) -> dict[str, Any]:
        """The row of the chosen prompts."""
        return next(row for row in self.candidates if row["phase"] == self.chosen)

    def to_fields(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "chosen": self.chosen,
            "scope": self.scope,
            "mode": self.mode,
            "before": self.before,
            "after": self.after,
            "candidates": self.candidates,
            "kept": self.kept.to_fields(),
            "token_scores": self.token_scores,
            "kv_scores": self.kv_scores,
            "hidden_scores": self.hidden_scores,
        }


def report_of(
    candidates: list[Candidate], chosen: Candidate, scores: Scores, *, scope: PruneScope, mode: PruneMode
) -> PruningReport:
    """Return the report of a finished search; ``scores`` are those of the unpruned model, the first candidate."""
    method = prunable_method(chosen.model)
    return PruningReport(
        candidates=[_row(candidate) for candidate in candidates],
        chosen=chosen.phase,
        scope=scope,
        mode=mode,
        token_scores=[block.tolist() for block in scores.tokens],
        kv_scores=[block.tolist() for block in scores.kv_tokens],
        hidden_scores=scores.hidden.tolist(),
        kept=method.kept,
        segmented=method.segmented,
    )


def _row(candidate: Candidate) -> dict[str, Any]:
    kept = prunable_method(candidate.model).kept
    return {
        "phase": candidate.phase,
        "keep": candidate.shares.tokens,
        "keep_segments": candidate.shares.segments,
        "keep_hidden": candidate.shares.hidden,
        "tokens_per_block": [len(block) for block in kept.tokens],
        "live_tokens_per_block": kept.live_tokens,
        "kv_tokens_per_block": [len(block) for block in kept.kv_tokens],
        "hidden": len(kept.hidden),
        "parameters": candidate.parameters,
        "tuned_percent": tuned_percent(candidate.model, candidate.model.vit),
        "bytes": prompt_bytes(candidate.model),
        "macs": count_macs(candidate.model),
        "val_accuracy": candidate.best.val_accuracy,
        "val_loss": candidate.best.val_loss,
        "epochs": candidate.epochs,
        "finished": candidate.finished,
    }
