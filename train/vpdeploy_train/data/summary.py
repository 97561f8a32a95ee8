"""What a data set comes to, told before training: its classes, its splits, and how evenly the images are shared."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vpdeploy.text import cut_name
from vpdeploy_train.data.example import SPLITS, DataSource

IMBALANCE: Final = 10
"""A largest class of more than so many times the smallest is pointed out."""

FEW_IMAGES: Final = 5
"""Classes of fewer training images are pointed out."""

_NAMED: Final = 3


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    """Numbers of images.

    Attributes:
        name: The data's name: their spec, of a path the last part.
        images: Images of ``train``, ``val`` and ``test``.
        carved: The splits that were drawn from others.
        classes: Training images by class, the largest class first; classes of equal size in their order.
    """

    name: str
    images: dict[str, int]
    carved: tuple[str, ...]
    classes: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, source: DataSource) -> DataSummary:
        """Count the images of a data set."""
        counts = Counter(example.label for example in source.train)
        classes = [(label, counts[number]) for number, label in enumerate(source.labels)]
        return cls(
            name=Path(source.spec).name or source.spec,
            images={split: len(getattr(source, split)) for split in SPLITS},
            carved=source.carved,
            classes=tuple(sorted(classes, key=lambda each: -each[1])),
        )

    def to_text(self) -> str:
        """Return one line for people."""
        origin = {"val": " (held out of train)", "test": " (held out of all images)"}
        parts = [
            f"{split} {count}{origin[split] if split in self.carved else ''}" for split, count in self.images.items()
        ]
        (largest, most), (smallest, least) = self.classes[0], self.classes[-1]
        shares = f"{least} training images each"
        if least != most:
            shares = f"{least} (of '{cut_name(smallest)}') to {most} (of '{cut_name(largest)}') training images each"
        return f"{self.name}: {len(self.classes)} classes of {shares}; images: {', '.join(parts)}"

    def remarks(self, *, balanced: bool = False) -> list[str]:
        """Return what is odd about the sizes of the classes, a line each.

        Args:
            balanced: Whether small classes count as much as large ones already.
        """
        lines = []
        filled = [each for each in self.classes if each[1]]
        (largest, most), (smallest, least) = filled[0], filled[-1]
        if most > IMBALANCE * least and not balanced:
            lines.append(
                f"class '{cut_name(largest)}' has {most} training images, '{cut_name(smallest)}' {least}: "
                "--class-weights balanced lets small classes count as much as large ones"
            )
        few = sorted((each for each in self.classes if each[1] < FEW_IMAGES), key=lambda each: each[1])
        if few:
            named = ", ".join(f"'{cut_name(label)}' {count}" for label, count in few[:_NAMED])
            whose = f"{len(few)} classes have" if len(few) > 1 else "1 class has"
            others = ", ..." if len(few) > _NAMED else ""
            lines.append(f"{whose} fewer than {FEW_IMAGES} training images ({named}{others}): expect little of them")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        (largest, most), (smallest, least) = self.classes[0], self.classes[-1]
        return {
            "held_out": list(self.carved),
            "largest_class": {"label": largest, "images": most},
            "smallest_class": {"label": smallest, "images": least},
        }
