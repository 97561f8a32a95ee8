"""Data sets of Hugging Face's ``datasets``: by name, or folders that it wrote or understands."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs

from vpdeploy.errors import InputError, MissingExtraError, SpecError
from vpdeploy_train.data.address import Address
from vpdeploy_train.data.collection import UNSPLIT, Collection, Format, Item
from vpdeploy_train.data.example import Record
from vpdeploy_train.data.splitnames import SPLIT_NAMES, split_named

_log = logging.getLogger("vpdeploy.train")

_PREFIX: Final = "hf:"
_LABEL_COLUMNS: Final = ("label", "labels")
_IMAGE_COLUMNS: Final = ("image", "img")


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What a spec asks for.

    Attributes:
        name: A data set on the hub, or a path.
        config: Its configuration; None takes the only one.
        columns: The columns that the spec names, by ``image`` and ``label``.
    """

    name: str
    config: str | None
    columns: Mapping[str, str]


def read_huggingface(spec: str) -> Collection:
    """Read ``hf:NAME[:CONFIG][?image=COLUMN&label=COLUMN]``; NAME may be a folder or a ``.parquet`` file.

    Images stay encoded in the data set's own files until they are needed. The names of a ``ClassLabel`` column are
    the class map. A split without labels, as some test splits are, is left out with a warning.

    Raises:
        SpecError: The data set cannot be loaded, has no split of a known name, or no one image and label column.
        MissingExtraError: ``datasets`` is not installed.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "datasets", "hf") from None
    request = _parse(spec)
    tables = _load(spec, request, datasets)
    features = next(iter(tables.values())).features
    image = _choose(spec, request, "image", _IMAGE_COLUMNS, _columns_of(features, datasets.Image))
    label = _choose(spec, request, "label", _LABEL_COLUMNS, _label_columns(features, datasets))
    labels = tuple(features[label].names) if isinstance(features[label], datasets.ClassLabel) else None
    splits: dict[str, tuple[Item, ...]] = {}
    for split, table in tables.items():
        encoded = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        names = list(_class_names(f"{spec}: {split}", table[label], labels))
        if any(name is None for name in names):
            if split == "train" or not all(name is None for name in names):
                raise SpecError(f"{spec}: {split}, row {names.index(None)} has no {label}; expected one in every row")
            _log.warning("%s: split '%s' has no labels and is left out", spec, split)
            continue
        splits[split] = tuple(
            Item(
                source=Record(name=f"{spec}, {split}, row {row}", read=partial(_read_image, encoded, image, row)),
                class_name=str(name),
            )
            for row, name in enumerate(names)
        )
    return Collection(splits=splits, augmentation="crop-flip", labels=labels)


def _parse(spec: str) -> _Request:
    """Take a spec apart."""
    address, _, query = spec.removeprefix(_PREFIX).partition("?")
    options = parse_qs(query)
    unknown = options.keys() - {"image", "label"}
    if unknown or (query and not options):
        raise SpecError(f"{spec}: unknown option '{min(unknown, default=query)}'; expected ?image=COLUMN&label=COLUMN")
    name, config = address, ""
    if not Path(address).expanduser().exists():
        name, _, config = address.partition(":")
    if not name:
        raise SpecError(f"{spec}: no name; expected hf:NAME, hf:NAME:CONFIG or hf:FOLDER")
    return _Request(name=name, config=config or None, columns={key: values[-1] for key, values in options.items()})


def _locate(spec: str) -> Address | None:
    """Take a spec apart where it names a folder or file that is there; else it is the name of a data set on the hub."""
    name, mark, query = spec.removeprefix(_PREFIX).partition("?")
    located = Address(before=_PREFIX, path=Path(name), after=mark + query)
    return located if name and (located.exists or located.place.is_absolute()) else None


def _load(spec: str, request: _Request, datasets: Any) -> dict[str, Any]:
    """Load a data set's tables by split; a single table is ``UNSPLIT``."""
    from vpdeploy_train.hub import why_unreachable, without_the_hub  # loads the hub's client

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    path = Path(request.name).expanduser()
    unreachable: str | None = None
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        elif path.is_file():
            loaded = datasets.load_dataset("parquet", data_files=str(path), split="train")
        elif path.is_dir():
            loaded = datasets.load_dataset(str(path), request.config)
        else:
            unreachable = why_unreachable(request.name, "README.md", kind="dataset")
            with without_the_hub() if unreachable else contextlib.nullcontext():
                loaded = datasets.load_dataset(request.name, request.config)
    except (OSError, ValueError, RuntimeError, LookupError, datasets.exceptions.DatasetsError) as error:
        if unreachable:
            raise SpecError(
                f"{spec}: is not in the local cache ({datasets.config.HF_DATASETS_CACHE}), and {unreachable}: copy the "
                "cache of a machine that has it (HF_HOME says where it is), or give a local folder"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SpecError(f"{spec}: cannot be loaded ({reason[:300]}): check the name, or give a local folder") from error
    if isinstance(loaded, datasets.Dataset):
        return {UNSPLIT: loaded}
    tables: dict[str, Any] = {}
    for name, table in loaded.items():
        split = split_named(str(name))
        if split is None or split in tables:
            _log.warning("%s: split '%s' is left out; splits are called %s", spec, name, ", ".join(SPLIT_NAMES))
        elif len(table):
            tables[split] = table
    if not tables:
        raise SpecError(f"{spec}: no images in splits called {', '.join(SPLIT_NAMES)}; found {', '.join(loaded)}")
    return tables


def _columns_of(features: Any, kind: type) -> list[str]:
    return [name for name, feature in features.items() if isinstance(feature, kind)]


def _label_columns(features: Any, datasets: Any) -> list[str]:
    """Return the columns that may hold labels: those with class names, else those of text or whole numbers."""
    named = _columns_of(features, datasets.ClassLabel)
    values = _columns_of(features, datasets.Value)
    return named or [name for name in values if "string" in features[name].dtype or "int" in features[name].dtype]


def _choose(spec: str, request: _Request, role: str, usual: tuple[str, ...], candidates: list[str]) -> str:
    """Return the column that the spec names, that has a usual name, or the only one."""
    if role in request.columns:
        if request.columns[role] in candidates:
            return request.columns[role]
        raise SpecError(
            f"{spec}: '{request.columns[role]}' is no {role} column; choose one of: {', '.join(candidates)}"
        )
    chosen = [name for name in usual if name in candidates][:1] or candidates
    if len(chosen) == 1:
        return chosen[0]
    if not chosen:
        raise SpecError(f"{spec}: no {role} column; expected one in the data set's features")
    raise SpecError(f"{spec}: several {role} columns, {', '.join(chosen)}: choose one with ?{role}={chosen[0]}")


def _class_names(place: str, values: Any, labels: tuple[str, ...] | None) -> Iterator[str | None]:
    """Yield the class name of each row; None where it has none."""
    for row, value in enumerate(values):
        if value is None or (labels is not None and value == -1):
            yield None
        elif labels is None:
            yield str(value)
        elif 0 <= value < len(labels):
            yield labels[value]
        else:
            raise SpecError(f"{place}, row {row}: label {value}; the data set names the classes 0 to {len(labels) - 1}")


def _read_image(table: Any, column: str, row: int) -> bytes:
    """Return the encoded image of a row."""
    cell = table[row][column]
    if cell is None:
        raise InputError("no image")
    if cell["bytes"] is not None:
        return bytes(cell["bytes"])
    try:
        return Path(cell["path"]).read_bytes()
    except OSError as error:
        raise InputError(f"{cell['path']}: cannot be read ({error.strerror or type(error).__name__})") from error


FORMAT: Final = Format(
    spelling="hf:NAME",
    matches=lambda spec: spec.startswith(_PREFIX),
    locate=_locate,
    read=read_huggingface,
)
