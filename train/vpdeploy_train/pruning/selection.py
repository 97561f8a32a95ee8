"""From scores and shares to what is kept."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from vpdeploy_train.methods.e2vpt import SEGMENTS, Kept
from vpdeploy_train.pruning.scores import Scores


def keep_tokens(kept: Kept, scores: Scores, share: float) -> Kept:
    """Keep the best visual and key/value prompts of every block, with all their segments.

    Args:
        kept: What there is, the order of ``scores``.
        scores: Importance of what there is.
        share: Of each kind and block, ⌊share · count⌋ are kept, but at least one.
    """
    tokens = tuple(_best(block, row, share) for block, row in zip(kept.tokens, scores.tokens, strict=True))
    kv_tokens = tuple(_best(block, row, share) for block, row in zip(kept.kv_tokens, scores.kv_tokens, strict=True))
    return Kept(
        tokens=tokens, kv_tokens=kv_tokens, segments=tuple(((True,) * SEGMENTS,) * len(block) for block in tokens)
    )


def keep_segments(kept: Kept, scores: Scores, share: float) -> Kept:
    """Keep the best segments of every visual prompt; ⌊share · R⌋ of each token, but at least one."""
    segments = tuple(
        tuple(
            tuple(position in _best(tuple(range(SEGMENTS)), row, share) for position in range(SEGMENTS))
            for row in block
        )
        for block in scores.segments
    )
    return replace(kept, segments=segments)


def _best(indices: tuple[int, ...], scores: Tensor, share: float) -> tuple[int, ...]:
    """Return the indices with the highest scores, ascending; of equal scores the earlier index stays."""
    if not indices:
        return ()
    count = max(1, math.floor(share * len(indices) + 1e-9))
    ranked = sorted(range(len(indices)), key=lambda position: (-float(scores[position]), position))
    return tuple(sorted(indices[position] for position in ranked[:count]))
