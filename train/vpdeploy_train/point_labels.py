"""Labels beside the points of a picture, none over another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.transforms import Bbox

_SIZE: Final = 8
_MARKER: Final = 6.0  # half a marker's side, in points
_NEAR: Final = 9.0  # from a point to the edge of a label beside it, in points
_RINGS: Final = 14
_STEP: Final = 7.0  # from one ring of places to the next, in points
_ANGLES: Final = (90, 270, 0, 180, 45, 135, 315, 225, 68, 112, 292, 248)  # above is best, then below

Point = tuple[float, float]


def label_points(axes: Axes, labels: Mapping[Point, str]) -> None:
    """Write a label beside each point where it covers no other label and no point, with a line to a distant one.

    Call it once everything else is drawn: places depend on the axes' limits and on the figure's layout.

    Args:
        axes: Where the points are drawn; their limits are fixed from here on.
        labels: By the points, in data coordinates.
    """
    # What the layout will be, in pixels; labels are no part of it, else it would move under them.
    figure: Any = axes.figure
    canvas: Any = FigureCanvasAgg(figure)
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    figure.draw_without_rendering()
    renderer = canvas.get_renderer()
    pixels = figure.dpi / 72
    area = axes.get_window_extent(renderer)
    spots = {point: tuple(axes.transData.transform(point)) for point in labels}
    taken = [Bbox.from_bounds(x, y, 0, 0).padded(_MARKER * pixels) for x, y in spots.values()]

    # From left to right, each at the first place that is free, or at the one that covers least.
    for point in sorted(labels):
        note = axes.annotate(
            labels[point], point, (0, 0), textcoords="offset points", ha="center", va="center", fontsize=_SIZE
        )
        note.set_in_layout(False)
        extent = note.get_window_extent(renderer)
        best, offset, least = extent, (0.0, 0.0), math.inf
        for across, up in _places(extent.width / pixels, extent.height / pixels):
            box = extent.translated(across * pixels, up * pixels)
            covered = sum(_overlap(box, other) for other in taken) + box.width * box.height - _overlap(box, area)
            if covered < least - 1e-6:
                best, offset, least = box, (across, up), covered
            if least <= 1e-6:
                break
        taken.append(best)
        note.set_position(offset)
        if math.hypot(*offset) > 2.5 * _NEAR:
            axes.annotate(
                "",
                point,
                offset,
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": "grey", "lw": 0.6, "shrinkA": _SIZE / 2, "shrinkB": 4},
            ).set_in_layout(False)


def _places(width: float, height: float) -> Iterator[Point]:
    """Yield where a label's centre may lie, from its point, in points: the nearest first."""
    for ring in range(_RINGS):
        for angle in _ANGLES:
            across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            reach = _NEAR + ring * _STEP
            yield across * (reach + width / 2), up * (reach + height / 2)


def _overlap(one: Bbox, other: Bbox) -> float:
    """Return the area that two boxes share, in square pixels."""
    width: float = min(one.x1, other.x1) - max(one.x0, other.x0)
    height: float = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(width, 0.0) * max(height, 0.0)
