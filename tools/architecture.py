"""Draw the two pictures of docs/architecture.md: ``python -m tools.architecture docs``.

Every box names the module that does the work, so a test can hold the pictures against the code.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

_COLOURS = {"train": "#dcebf7", "export": "#e3f2df", "runtime": "#fbeed9", "file": "#ffffff"}
_WIDTH, _HEIGHT = 2.5, 0.95


@dataclass(frozen=True, kw_only=True)
class Box:
    """One step of a diagram.

    Attributes:
        title: What happens, or the file that lies between two steps.
        modules: Who does it, as Python names.
        room: Key of ``_COLOURS``: the package, or ``file`` for what is on disk.
        at: Column and row, counted from the upper left corner.
    """

    title: str
    room: str
    at: tuple[float, float]
    modules: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Diagram:
    """Boxes and the arrows between them.

    Attributes:
        name: Of the file, without its ending.
        title: Above the picture.
        boxes: By a short name.
        arrows: From box to box, with what travels.
    """

    name: str
    title: str
    boxes: dict[str, Box]
    arrows: tuple[tuple[str, str, str], ...]


PIPELINE = Diagram(
    name="architecture_pipeline",
    title="From images to a served model",
    boxes={
        "data": Box(title="images and labels", room="train", at=(0, 0), modules=("vpdeploy_train.data",)),
        "train": Box(
            title="train, prune, rewind",
            room="train",
            at=(1, 0),
            modules=("vpdeploy_train.training", "vpdeploy_train.phases", "vpdeploy_train.methods"),
        ),
        "run": Box(title="run folder", room="file", at=(2, 0), modules=("vpdeploy_train.run",)),
        "compile": Box(
            title="compile prompts",
            room="export",
            at=(2, 1),
            modules=("vpdeploy_export.export", "vpdeploy_export.compilation"),
        ),
        "graph": Box(
            title="build and trace the graph",
            room="export",
            at=(1, 1),
            modules=("vpdeploy_export.graph", "vpdeploy_export.onnx", "vpdeploy_export.passes"),
        ),
        "gate": Box(title="parity gate", room="export", at=(0, 1), modules=("vpdeploy_export.parity",)),
        "bundle": Box(
            title="bundle or task.onnx",
            room="file",
            at=(0, 2),
            modules=("vpdeploy.format.artifact", "vpdeploy.format.bundle"),
        ),
        "engine": Box(title="engine (optional)", room="runtime", at=(1, 2.6), modules=("vpdeploy.engines",)),
        "session": Box(
            title="session: table and runtime",
            room="runtime",
            at=(2, 2),
            modules=("vpdeploy.session.session", "vpdeploy.table", "vpdeploy.backends"),
        ),
        "server": Box(
            title="batcher and server", room="runtime", at=(3, 2), modules=("vpdeploy.serving", "vpdeploy.server")
        ),
    },
    arrows=(
        ("data", "train", ""),
        ("train", "run", ""),
        ("run", "compile", "prompts, head"),
        ("compile", "graph", "keys, values,\ngenerators"),
        ("graph", "gate", "staged\nONNX file"),
        ("gate", "bundle", "published"),
        ("bundle", "engine", ""),
        ("engine", "session", ""),
        ("bundle", "session", "graph and prompt sets"),
        ("session", "server", ""),
    ),
)

REQUEST = Diagram(
    name="architecture_request",
    title="The path of a request",
    boxes={
        "route": Box(
            title="route: token, limits",
            room="runtime",
            at=(0, 0),
            modules=("vpdeploy.server.image_routes", "vpdeploy.server.oip_routes"),
        ),
        "service": Box(title="service", room="runtime", at=(1, 0), modules=("vpdeploy.server.service",)),
        "decode": Box(
            title="decode to pixels", room="runtime", at=(2, 0), modules=("vpdeploy.server.decoding", "vpdeploy.image")
        ),
        "queue": Box(
            title="lease and queue",
            room="runtime",
            at=(3, 0),
            modules=("vpdeploy.serving.queue", "vpdeploy.session.slots"),
        ),
        "batcher": Box(
            title="mixed batch",
            room="runtime",
            at=(3, 1),
            modules=("vpdeploy.serving.batcher", "vpdeploy.serving.batch"),
        ),
        "session": Box(title="session.run", room="runtime", at=(2, 1), modules=("vpdeploy.session.session",)),
        "backend": Box(title="runtime on the device", room="runtime", at=(1, 1), modules=("vpdeploy.backends",)),
        "answer": Box(
            title="rank classes, answer",
            room="runtime",
            at=(0, 1),
            modules=("vpdeploy.session.prediction", "vpdeploy.server.oip_response"),
        ),
    },
    arrows=(
        ("route", "service", "body"),
        ("service", "decode", "bytes"),
        ("decode", "queue", "uint8\n[H, W, 3]"),
        ("queue", "batcher", "images, slots"),
        ("batcher", "session", "[B, H, W, 3]\nand slots [B]"),
        ("session", "backend", "table\nbound once"),
        ("backend", "answer", "logits\n[B, C]"),
    ),
)


def draw(picture: Diagram) -> Figure:
    """Return a picture's figure."""
    columns = 1 + max(box.at[0] for box in picture.boxes.values())
    rows = 1 + max(box.at[1] for box in picture.boxes.values())
    figure = Figure(figsize=(3.2 * columns, 1.7 * rows), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(-0.2, 3.5 * columns - 0.8), ylim=(-1.9 * rows + 0.5, 0), title=picture.title)
    axes.set_axis_off()
    for box in picture.boxes.values():
        _draw_box(axes, box)
    for start, end, what in picture.arrows:
        _draw_arrow(axes, picture.boxes[start], picture.boxes[end], what)
    return figure


def _corner(box: Box) -> tuple[float, float]:
    """Return a box's lower left corner."""
    column, row = box.at
    return 3.5 * column, -1.9 * row - _HEIGHT - 0.3


def _draw_box(axes: Axes, box: Box) -> None:
    x, y = _corner(box)
    axes.add_patch(
        FancyBboxPatch(
            (x, y),
            _WIDTH,
            _HEIGHT,
            boxstyle="round,pad=0.06",
            facecolor=_COLOURS[box.room],
            edgecolor="0.35",
            linestyle="--" if box.room == "file" else "-",
        )
    )
    axes.text(x + _WIDTH / 2, y + _HEIGHT - 0.12, box.title, ha="center", va="top", fontsize=10, weight="bold")
    for index, module in enumerate(box.modules):
        axes.text(x + _WIDTH / 2, y + _HEIGHT - 0.45 - 0.2 * index, module, ha="center", va="center", fontsize=7.5)


def _draw_arrow(axes: Axes, start: Box, end: Box, what: str) -> None:
    x0, y0 = _corner(start)
    x1, y1 = _corner(end)
    centre = (x0 + _WIDTH / 2, y0 + _HEIGHT / 2), (x1 + _WIDTH / 2, y1 + _HEIGHT / 2)
    # The arrow leaves and enters at the side that faces the other box.
    if abs(x1 - x0) > abs(y1 - y0):
        side = 1 if x1 > x0 else -1
        points = (
            (centre[0][0] + side * (_WIDTH / 2 + 0.08), centre[0][1]),
            (
                centre[1][0] - side * (_WIDTH / 2 + 0.08),
                centre[1][1],
            ),
        )
    else:
        side = 1 if y1 > y0 else -1
        points = (
            (centre[0][0], centre[0][1] + side * (_HEIGHT / 2 + 0.08)),
            (
                centre[1][0],
                centre[1][1] - side * (_HEIGHT / 2 + 0.08),
            ),
        )
    axes.add_patch(FancyArrowPatch(*points, arrowstyle="-|>", mutation_scale=14, color="0.25"))
    middle = (points[0][0] + points[1][0]) / 2, (points[0][1] + points[1][1]) / 2
    if points[0][0] == points[1][0]:  # an upright arrow has its words beside it
        axes.text(middle[0] + 0.1, middle[1], what, ha="left", va="center", fontsize=7.5, color="0.25")
    else:
        axes.text(middle[0], middle[1] + 0.08, what, ha="center", va="bottom", fontsize=7.5, color="0.25")


PICTURES = (PIPELINE, REQUEST)


def main(folder: Path) -> None:
    """Write both pictures into a folder."""
    for picture in PICTURES:
        draw(picture).savefig(folder / f"{picture.name}.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
