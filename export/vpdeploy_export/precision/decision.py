"""From the largest activations to what stays float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from vpdeploy.graphfacts import Precision
from vpdeploy_export.precision.islands import Islands, Part
from vpdeploy_export.precision.probe import EMBEDDING, FINAL, WEIGHTS, Maxima, part_of

LARGEST: Final[dict[Precision, float]] = {"fp16": 65504.0}
"""Largest finite number of a type, where activations of a trained model can come near it."""

MARGIN: Final = 4.0
"""How far an activation may grow beyond what the probe's images gave before it overflows; constants need none."""


@dataclass(frozen=True, kw_only=True)
class PrecisionReport:
    """What a probe found and what follows.

    Attributes:
        precision: The precision of the graph.
        islands: The parts that stay float32.
        maxima: The largest absolute values by block and place.
        images: Where each task's images come from, by task.
    """

    precision: Precision
    islands: Islands
    maxima: Maxima
    images: dict[str, str]

    def to_fields(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "type": self.precision,
            "float32": self.islands.to_fields(),
            "probe": {
                "largest": LARGEST.get(self.precision),
                "margin": MARGIN,
                "images": self.images,
                "maxima": self.maxima.to_fields(),
            },
        }


def choose_islands(maxima: Maxima, precision: Precision, *, depth: int) -> Islands:
    """Return the parts whose values would overflow the precision.

    A part is float32 where one of its activations exceeds the type's largest number divided by ``MARGIN``, or one of
    its constants the largest number itself. A residual stream that is float32 stays so up to the final norm: blocks
    only add to it.

    Args:
        maxima: What the probe found.
        precision: The precision of the graph.
        depth: The number of blocks, L.
    """
    largest = LARGEST.get(precision)
    if largest is None:
        return Islands()
    blocks: dict[int, frozenset[Part]] = {}
    wide_tokens = False
    for index in range(depth):
        parts: set[Part] = {part_of(place) for place in _overflowing(maxima.of(index), largest)}
        wide_tokens |= "residual" in parts
        if wide_tokens:
            parts.add("residual")
        if parts:
            blocks[index] = frozenset(parts)
    return Islands(
        blocks=blocks,
        embedding=bool(_overflowing(maxima.found.get(EMBEDDING, {}), largest)),
        final=wide_tokens or bool(_overflowing(maxima.found.get(FINAL, {}), largest)),
    )


def _overflowing(places: dict[str, float], largest: float) -> list[str]:
    return [
        place for place, value in places.items() if value > (largest if place.endswith(WEIGHTS) else largest / MARGIN)
    ]
