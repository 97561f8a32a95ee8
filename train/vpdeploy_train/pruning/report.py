"""What the pruning search did, in types and as ``pruning.json`` tells it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from vpdeploy.errors import BundleCorruptError
from vpdeploy.format.document import Document
from vpdeploy_train.footprint import count_macs, prompt_bytes, tuned_percent
from vpdeploy_train.methods.kept import Kept
from vpdeploy_train.pruning.scores import Scores, prunable_method
from vpdeploy_train.pruning.search import Candidate
from vpdeploy_train.settings import PruneMode, PruneScope


@dataclass(frozen=True, kw_only=True)
class CandidateRow:
    """What one candidate of the search kept, costs and reached.

    Attributes:
        phase: The phase that trained it.
        keep: Share of tokens it might keep, in (0, 1].
        keep_segments: Share of segments it might keep, in (0, 1].
        keep_hidden: Share of a feature projector's hidden units it might keep, in (0, 1].
        tokens_per_block: Visual prompts of each block.
        live_tokens_per_block: Those of them that are not zero vectors.
        kv_tokens_per_block: Key/value prompts of each block.
        hidden: Hidden units of a feature projector.
        parameters: The papers' count: trained numbers, less those of pruned segments.
        tuned_percent: Prompts and head as a share of backbone and head, in percent.
        size_bytes: Bytes of the stored prompt tensors.
        macs: Multiply-accumulates of one image when deployed; None where they are not counted.
        val_accuracy: Validation accuracy of the best epoch, in [0, 1].
        val_loss: Validation loss of the best epoch.
        epochs: How many epochs it was trained.
        finished: Whether these were all.
    """

    phase: str
    keep: float
    keep_segments: float
    keep_hidden: float
    tokens_per_block: tuple[int, ...]
    live_tokens_per_block: tuple[int, ...]
    kv_tokens_per_block: tuple[int, ...]
    hidden: int
    parameters: int
    tuned_percent: float
    size_bytes: int
    macs: int | None
    val_accuracy: float
    val_loss: float
    epochs: int
    finished: bool

    @classmethod
    def from_document(cls, document: Document) -> CandidateRow:
        """Return the row of a JSON form.

        Args:
            document: What ``to_json`` returned.

        Raises:
            BundleCorruptError: A field is missing or of another type.
        """
        return cls(
            phase=document.take("phase", str),
            keep=document.take("keep", float),
            keep_segments=document.take("keep_segments", float),
            keep_hidden=document.take("keep_hidden", float),
            tokens_per_block=tuple(document.take_list("tokens_per_block", int)),
            live_tokens_per_block=tuple(document.take_list("live_tokens_per_block", int)),
            kv_tokens_per_block=tuple(document.take_list("kv_tokens_per_block", int)),
            hidden=document.take("hidden", int),
            parameters=document.take("parameters", int),
            tuned_percent=document.take("tuned_percent", float),
            size_bytes=document.take("bytes", int),
            macs=None if document.fields.get("macs") is None else document.take("macs", int),
            val_accuracy=document.take("val_accuracy", float),
            val_loss=document.take("val_loss", float),
            epochs=document.take("epochs", int),
            finished=document.take("finished", bool),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; its keys are the attributes' names, but for ``bytes``."""
        return {
            name.removeprefix("size_"): list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
        }


Importances = tuple[tuple[float, ...], ...]
"""For each block, the importance of each of its prompts; larger matters more."""


@dataclass(frozen=True, kw_only=True)
class PruningReport:
    """What the search did.

    Attributes:
        candidates: Every prompt set that was tried, the unpruned one first.
        chosen: The phase that trained the chosen candidate.
        scope: ``layer`` or ``shared``.
        mode: ``remove`` or ``zero``.
        token_scores: Importance before pruning, for each block and visual prompt.
        kv_scores: Importance before pruning, for each block and key/value prompt.
        hidden_scores: Importance before pruning, for each hidden unit of a feature projector.
        kept: What the chosen one keeps, by original index.

    Example:
        >>> pruning = vpdeploy_train.TrainingResult.read(pruned).pruning
        >>> [row.keep for row in pruning.candidates]
        [1.0, 0.5]
        >>> pruning.after.parameters <= pruning.before.parameters
        True
    """

    candidates: tuple[CandidateRow, ...]
    chosen: str
    scope: PruneScope
    mode: PruneMode
    token_scores: Importances
    kv_scores: Importances
    hidden_scores: tuple[float, ...]
    kept: Kept

    @property
    def before(self) -> CandidateRow:
        """The row of the unpruned prompts."""
        return self.candidates[0]

    @property
    def after(self) -> CandidateRow:
        """The row of the chosen prompts."""
        return next(row for row in self.candidates if row.phase == self.chosen)

    @property
    def divides_tokens(self) -> bool:
        """Whether a candidate might lose segments of the tokens that it keeps."""
        return any(row.keep_segments < 1 for row in self.candidates)

    @classmethod
    def from_document(cls, document: Document) -> PruningReport:
        """Return the report of a JSON form.

        Args:
            document: What ``to_json`` returned.

        Raises:
            BundleCorruptError: A field is missing, of another type, or contradicts another.
        """
        rows = [
            CandidateRow.from_document(Document(f"{document.source}: candidates[{index}]", fields))
            for index, fields in enumerate(document.take_list("candidates", dict))
        ]
        try:
            kept = Kept.from_fields(document.take("kept", dict))
        except (KeyError, TypeError, ValueError) as error:
            raise BundleCorruptError(f"{document.source}: field 'kept': {error}") from error
        return cls(
            candidates=tuple(rows),
            chosen=_one_of([row.phase for row in rows], document, "chosen"),
            scope=_one_of(get_args(PruneScope), document, "scope"),
            mode=_one_of(get_args(PruneMode), document, "mode"),
            token_scores=_importances(document, "token_scores"),
            kv_scores=_importances(document, "kv_scores"),
            hidden_scores=tuple(document.take_list("hidden_scores", float)),
            kept=kept,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, as ``pruning.json`` and a run's card hold it."""
        return {
            "chosen": self.chosen,
            "scope": self.scope,
            "mode": self.mode,
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "candidates": [row.to_json() for row in self.candidates],
            "kept": self.kept.to_fields(),
            "token_scores": [list(block) for block in self.token_scores],
            "kv_scores": [list(block) for block in self.kv_scores],
            "hidden_scores": list(self.hidden_scores),
        }


def report_of(
    candidates: list[Candidate], chosen: Candidate, scores: Scores, *, scope: PruneScope, mode: PruneMode
) -> PruningReport:
    """Return the report of a finished search; ``scores`` are those of the unpruned model, the first candidate."""
    return PruningReport(
        candidates=tuple(_row(candidate) for candidate in candidates),
        chosen=chosen.phase,
        scope=scope,
        mode=mode,
        token_scores=tuple(tuple(block.tolist()) for block in scores.tokens),
        kv_scores=tuple(tuple(block.tolist()) for block in scores.kv_tokens),
        hidden_scores=tuple(scores.hidden.tolist()),
        kept=prunable_method(chosen.model).kept,
    )


def _row(candidate: Candidate) -> CandidateRow:
    kept = prunable_method(candidate.model).kept
    return CandidateRow(
        phase=candidate.phase,
        keep=candidate.shares.tokens,
        keep_segments=candidate.shares.segments,
        keep_hidden=candidate.shares.hidden,
        tokens_per_block=tuple(len(block) for block in kept.tokens),
        live_tokens_per_block=tuple(kept.live_tokens),
        kv_tokens_per_block=tuple(len(block) for block in kept.kv_tokens),
        hidden=len(kept.hidden),
        parameters=candidate.parameters,
        tuned_percent=tuned_percent(candidate.model, candidate.model.vit),
        size_bytes=prompt_bytes(candidate.model),
        macs=count_macs(candidate.model),
        val_accuracy=candidate.best.val_accuracy,
        val_loss=candidate.best.val_loss,
        epochs=candidate.epochs,
        finished=candidate.finished,
    )


def _one_of(choices: Sequence[Any], document: Document, name: str) -> Any:
    """Return a field that is one of some texts."""
    found = document.take(name, str)
    if found not in choices:
        raise BundleCorruptError(f"{document.source}: field '{name}' is '{found}', expected one of {list(choices)}")
    return found


def _importances(document: Document, name: str) -> Importances:
    """Return a field that lists numbers for each block."""
    blocks = document.take_list(name, list)
    rows = [Document(f"{document.source}: {name}[{index}]", {"block": block}) for index, block in enumerate(blocks)]
    return tuple(tuple(row.take_list("block", float)) for row in rows)
