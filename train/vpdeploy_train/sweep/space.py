"""What a sweep varies: ranges and choices for settings, by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from vpdeploy.errors import SpecError
from vpdeploy.toml import name_advice
from vpdeploy_train.config import FileSettings
from vpdeploy_train.methods.options import Part
from vpdeploy_train.option import Option, options_of
from vpdeploy_train.settings import TrainSettings, every_option, usable_method

_VARIED: Final = ("method", "lr", "weight_decay", "head_lr_scale", "batch_size", "keep")

_COMMON: Final = frozenset(
    {
        *("data", "recipe", "backbone", "weights", "image_size", "resize", "crop_ratio", "pooling", "normalisation"),
        *("val_fraction", "skip_corrupt", "augment", "seed", "device", "workers", "epochs"),
    }
)
"""Settings that all trials share: they decide which images and backbone are loaded, and what an epoch is."""

_PARTS: Final[Mapping[str, Part]] = {
    "keep": "tokens",
    "keep_segments": "segments",
    "keep_hidden": "hidden",
    "prune_kv": "key_values",
}
"""What a method's prompts must consist of for a setting of pruning to concern it."""

_LOGARITHMIC: Final = ("lr", "weight_decay", "head_lr_scale")
_ENDS: Final = ("low", "high")
_PAPER_LRS: Final = (50.0, 25.0, 10.0, 5.0, 2.5, 1.0, 0.5, 0.25, 0.1, 0.05)
_PAPER_DECAYS: Final = (0.01, 0.001, 0.0001, 0.0)


@dataclass(frozen=True, kw_only=True)
class Choices:
    """A setting takes one of some values."""

    values: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A setting takes any number from ``low`` to ``high``, evenly in its logarithm where ``log``."""

    low: float
    high: float
    log: bool
    whole: bool


Dimension = Choices | Interval
Space = Mapping[str, Dimension]


def may_vary(option: Option) -> bool:
    """Tell whether a setting's command-line option may be a range or a list: any number that is a method's own."""
    if option.name in options_of(TrainSettings):
        return option.name in _VARIED
    return option.kind in (int, float)


def applies(name: str, method: str) -> bool:
    """Tell whether a method knows a setting.

    Raises:
        SpecError: There is no such method, or it is broken.
    """
    kind = usable_method(method)
    if name in _PARTS:
        return _PARTS[name] in kind.parts
    return name in options_of(TrainSettings) or name in options_of(kind.Options)


def read_option(name: str, text: str) -> Any:
    """Return what an option says: an ``Interval`` (``LOW:HIGH``), ``Choices`` (``A,B,C``) or one value.

    A list of ``--keep`` is one value, as for ``vpdeploy train``.

    Raises:
        SpecError: It is malformed.
    """
    option = "--" + name.replace("_", "-")
    kind = _kind_of(name)
    if text in every_option()[name].words:
        return text
    if ":" in text and kind in (int, float, "share"):
        parts = text.split(":")
        if len(parts) != 2:
            raise SpecError(f"{option} '{text}': expected LOW:HIGH")
        low, high = (_number(option, part) for part in parts)
        return _range(option, name, low, high)
    if kind == "share":
        return text
    values = tuple(_value(option, kind, part) for part in text.split(","))
    return values[0] if len(values) == 1 else Choices(values=values)


def read_space(layer: FileSettings) -> dict[str, Dimension]:
    """Return the space of a file: a table for each setting, with ``values``, or with ``low``, ``high`` and ``log``.

    Raises:
        SpecError: A table is malformed; the message names the file.
    """
    known = every_option()
    space: dict[str, Dimension] = {}
    for name, table in layer.items():
        if name not in known:
            raise SpecError(f"{layer.file}: unknown setting '{name}'; {name_advice(name, list(known))}")
        if name in _COMMON:
            raise SpecError(f"{layer.file}: '{name}' is the same in all trials; give it as an option of the sweep")
        place = f"{layer.file}: [{name}]"
        keys = set(table) if isinstance(table, dict) else set()
        if keys == {"values"} and isinstance(table["values"], list) and table["values"]:
            values = [known[name].typed(value, origin=f"{place}: ") for value in table["values"]]
            space[name] = Choices(values=tuple(values))
        elif {"low", "high"} <= keys <= {"low", "high", "log"}:
            low, high = (replace(known[name], kind=float).typed(table[key], origin=f"{place}: ") for key in _ENDS)
            log = replace(known[name], kind=bool).typed(table.get("log", name in _LOGARITHMIC), origin=f"{place} log: ")
            space[name] = _range(place, name, low, high, log=log)
        else:
            raise SpecError(f"{place}: expected values = [...], or low, high and perhaps log = true")
    if not space:
        raise SpecError(f"{layer.file}: names no setting to vary")
    return space


def default_space(settings: TrainSettings, given: set[str], *, methods: Sequence[str] = ()) -> dict[str, Dimension]:
    """Return what is varied where nothing else is said: learning rate, weight decay and what the methods declare.

    With SGD, the papers' grid (VPT, arXiv 2203.12119); with AdamW, rates around the method's default. Where methods are
    compared, the rates reach around all of their defaults, and an option takes the values that any of them declares; a
    trial draws those that its method knows.

    Args:
        settings: What all trials have in common.
        given: Settings that were chosen already.
        methods: The methods that are compared; none where it is that of the settings.
    """
    compared = [settings.changed(method=name) for name in methods] or [settings]
    bases = [each.base_lr for each in compared]
    space: dict[str, Dimension] = {
        "lr": Choices(values=_PAPER_LRS)
        if settings.optimizer == "sgd"
        else Interval(low=min(bases) / 10, high=max(bases) * 30, log=True, whole=False),
        "weight_decay": Choices(values=_PAPER_DECAYS),
    }
    declared: dict[str, dict[Any, None]] = {}
    for method in compared:
        for name, each in options_of(type(method.options)).items():
            if each.sweep:
                declared.setdefault(name, {}).update(dict.fromkeys(each.sweep))
    space |= {name: Choices(values=tuple(values)) for name, values in declared.items()}
    return {name: space[name] for name in space if name not in given}


def check_space(settings: TrainSettings, space: Space) -> None:
    """Check that every value of the space is one that the settings may have.

    Raises:
        SpecError: One is not, nothing is varied, or something that no method of the sweep knows.
    """
    if not space:
        raise SpecError("nothing to vary: give a range such as --lr 0.01:3, a list such as --prompt-tokens 5,10,50")
    varied = space.get("method")
    methods = varied.values if isinstance(varied, Choices) else (settings.method,)
    for name, dimension in space.items():
        knowing = [method for method in methods if applies(name, method)]
        if not knowing:
            raise SpecError(f"--{name.replace('_', '-')}: method '{settings.method}' does not know it; leave it away")
        ends = dimension.values if isinstance(dimension, Choices) else (dimension.low, dimension.high)
        for value in ends:
            with_values(settings, {"method": knowing[0], name: value})


def with_values(settings: TrainSettings, values: Mapping[str, Any]) -> TrainSettings:
    """Return the settings of a trial.

    Raises:
        SpecError: A value is out of range.
    """
    typed = {
        name: f"{value:.3g}" if _is_share(name, value) else int(value) if _kind_of(name) is int else value
        for name, value in values.items()
    }
    return settings.changed(**typed)


def to_fields(space: Space) -> dict[str, Any]:
    """Return the JSON form."""
    return {name: asdict(dimension) for name, dimension in space.items()}


def _range(place: str, name: str, low: float, high: float, *, log: bool | None = None) -> Interval:
    log = name in _LOGARITHMIC if log is None else log
    if _kind_of(name) not in (int, float, "share"):
        raise SpecError(f"{place}: takes no numbers, so it has no range; list values")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise SpecError(f"{place}: expected LOW below HIGH, found {low:g} and {high:g}")
    if log and low <= 0:
        raise SpecError(f"{place}: the range is logarithmic, so LOW should be above 0, found {low:g}")
    return Interval(low=low, high=high, log=log, whole=_kind_of(name) is int)


def _kind_of(name: str) -> Any:
    """Return ``int``, ``float``, ``bool`` or ``str``; "share" for the texts that may be one number."""
    if name in ("keep", "keep_segments"):
        return "share"
    return every_option()[name].kind


def _is_share(name: str, value: Any) -> bool:
    return _kind_of(name) == "share" and isinstance(value, float)


def _value(option: str, kind: Any, text: str) -> Any:
    if kind is int:
        return _whole(option, text)
    return _number(option, text) if kind is float else text.strip()


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise SpecError(f"{option}: '{text}' is not a number; expected a value, LOW:HIGH or A,B,C") from None


def _whole(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise SpecError(f"{option}: '{text}' is not a whole number; expected a value, LOW:HIGH or A,B,C") from None
