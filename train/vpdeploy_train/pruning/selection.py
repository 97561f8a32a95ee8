"""From scores and shares to what is kept."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from vpdeploy_train.methods.kept import SEGMENTS, Kept
from vpdeploy_train.pruning.scores import Scores

_WHOLE, _ZERO = (True,) * SEGMENTS, (False,) * SEGMENTS


def keep_tokens(kept: Kept, scores: Scores, share: float) -> Kept:
    """Keep the best visual prompts of every block, with all their segments, and remove the others.

    Args:
        kept: The prompts that there are, in the order of ``scores``.
        scores: The importance of these prompts.
        share: The share of each block's T prompts that is kept: ⌊share · T⌋, but at least one.
    """
    tokens = tuple(_best(block, row, share) for block, row in zip(kept.tokens, scores.tokens, strict=True))
    return replace(kept, tokens=tokens, segments=tuple((_WHOLE,) * len(block) for block in tokens))


def zero_tokens(kept: Kept, scores: Scores, share: float) -> Kept:
    """Set all but the best visual prompts of every block to zero: they stay, and are attended to (E²VPT's code).

    Args:
        kept: The prompts that there are, in the order of ``scores``.
        scores: The importance of these prompts.
        share: The share of each block's T prompts that is not zeroed: ⌊share · T⌋, but at least one.
    """
    best = keep_tokens(kept, scores, share).tokens
    segments = tuple(
        tuple(_WHOLE if token in live else _ZERO for token in block)
        for block, live in zip(kept.tokens, best, strict=True)
    )
    return replace(kept, segments=segments)


def keep_kv_tokens(kept: Kept, scores: Scores, share: float) -> Kept:
    """Keep the best key/value prompts of every block and remove the others; ⌊share · T_KV⌋, but at least one."""
    kv_tokens = tuple(_best(block, row, share) for block, row in zip(kept.kv_tokens, scores.kv_tokens, strict=True))
    return replace(kept, kv_tokens=kv_tokens)


def keep_hidden(kept: Kept, scores: Scores, share: float) -> Kept:
    """Keep the best hidden units of a feature projector; ⌊share · r⌋, but at least one."""
    return replace(kept, hidden=_best(kept.hidden, scores.hidden, share))


def keep_segments(kept: Kept, scores: Scores, share: float) -> Kept:
    """Keep the best segments of every visual prompt that is not zero; ⌊share · R⌋ of each, but at least one."""
    segments = tuple(
        tuple(
            _flags(_best(tuple(range(SEGMENTS)), row, share)) if any(flags) else _ZERO
            for flags, row in zip(block, rows, strict=True)
        )
        for block, rows in zip(kept.segments, scores.segments, strict=True)
    )
    return replace(kept, segments=segments)


def _flags(positions: tuple[int, ...]) -> tuple[bool, ...]:
    return tuple(position in positions for position in range(SEGMENTS))


def _best(indices: tuple[int, ...], scores: Tensor, share: float) -> tuple[int, ...]:
    """Return the indices with the highest scores, ascending; of equal scores the earlier index stays."""
    if not indices:
        return ()
    count = max(1, math.floor(share * len(indices) + 1e-9))
    ranked = sorted(range(len(indices)), key=lambda position: (-float(scores[position]), position))
    return tuple(sorted(indices[position] for position in ranked[:count]))
