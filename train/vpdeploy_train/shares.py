"""Which shares of a prompt set the pruning search keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from vpdeploy.errors import SpecError

AUTO: Final = "auto"
_AUTO_TOKENS: Final = (0.5, 0.25, 0.75, 0.1, 0.9, 0.35, 0.65, 0.2, 0.8)
_AUTO_SEGMENTS: Final = 0.75
_AUTO_CANDIDATES: Final = 6


@dataclass(frozen=True, kw_only=True)
class Shares:
    """What a candidate keeps, as shares in (0, 1].

    Attributes:
        tokens: Share of each block's visual and key/value prompts.
        segments: Share of the segments of each visual prompt that remains.
        hidden: Share of a feature projector's hidden units.
    """

    tokens: float = 1.0
    segments: float = 1.0
    hidden: float = 1.0


def parse_shares(keep: str, keep_segments: str, *, hidden: float, candidates: int | None) -> list[Shares]:
    """Return the candidates that are asked for, besides the one that keeps everything.

    Args:
        keep: ``auto``, or shares of tokens separated by commas.
        keep_segments: ``auto``, one share, or as many as there are shares of tokens.
        hidden: Share of hidden units that every candidate keeps.
        candidates: How many candidates there should be; None takes as many as are listed, or ``auto``'s own number.

    Raises:
        SpecError: A list is malformed, or its length is not that of another.
    """
    if keep == AUTO:
        count = _AUTO_CANDIDATES if candidates is None else candidates
        if not 1 <= count <= len(_AUTO_TOKENS):
            raise SpecError(f"--prune-candidates should be 1 to {len(_AUTO_TOKENS)}, found {count}")
        tokens = list(_AUTO_TOKENS[:count])
    else:
        tokens = _parse("--keep", keep)
        if candidates not in (None, len(tokens)):
            raise SpecError(f"--prune-candidates {candidates}: --keep {keep} lists {len(tokens)}; give one of the two")
    segments = [_AUTO_SEGMENTS] if keep_segments == AUTO else _parse("--keep-segments", keep_segments)
    if len(segments) == 1:
        segments *= len(tokens)
    if len(segments) != len(tokens):
        raise SpecError(
            f"--keep-segments {keep_segments}: expected one share, or {len(tokens)} as in --keep; found {len(segments)}"
        )
    return [
        Shares(tokens=share, segments=share_of_token, hidden=hidden)
        for share, share_of_token in zip(tokens, segments, strict=True)
    ]


def _parse(option: str, text: str) -> list[float]:
    """Parse a comma-separated list of shares in (0, 1]."""
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 < share <= 1 for share in shares):
        raise SpecError(f"{option} '{text}': expected 'auto' or shares in (0, 1], e.g. 0.5,0.25")
    return shares
