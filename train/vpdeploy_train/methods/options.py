"""What a method lets its user choose, and the rates it is trained at by default: facts that need no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vpdeploy_train.option import Limits, between, check_options, option

SegmentOrder = Literal["contiguous", "strided"]

Part = Literal["tokens", "key_values", "segments", "hidden"]
"""What pruning can take from a method: visual prompts, key/value prompts, segments of visual prompts, hidden units."""


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """The base of every method's ``Options``: a frozen, keyword-only dataclass whose fields ``option`` declares.

    A field's name is its key in TOML files and, with dashes, its flag. A flag that several methods have has to mean the
    same in all of them; inheriting the field is the simplest way. Only its default and sweep values may differ.

    Raises:
        SpecError: A value is out of range.
    """

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, kw_only=True)
class TokenOptions(MethodOptions):
    """Options of a method with visual prompts."""

    prompt_tokens: int = option(10, "visual prompts per block", limits=between(0, 1000), sweep=(1, 5, 10, 50))


@dataclass(frozen=True, kw_only=True)
class DeepOptions(TokenOptions):
    """Options of a method with fresh visual prompts in every block."""

    prompt_dropout: float = option(0.1, "dropout on the visual prompts", limits=Limits(low=0, high=1, high_open=True))


@dataclass(frozen=True, kw_only=True)
class SegmentOptions(DeepOptions):
    """Options of a method whose visual prompts consist of segments that pruning can set to zero."""

    segment_order: SegmentOrder = option("contiguous", "how channels form segments")


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Learning rates for batches of 256 images where nobody chooses one.

    Attributes:
        sgd: With SGD and momentum 0.9.
        adamw: With AdamW.
    """

    sgd: float
    adamw: float

    def of(self, optimizer: Literal["sgd", "adamw"]) -> float:
        """Return the rate for an optimizer."""
        return self.sgd if optimizer == "sgd" else self.adamw


PROMPT_RATES = Rates(sgd=0.25, adamw=0.03)
"""Of prompts and of a classifier alone; where a backbone's own weights move, they have to move far less."""
