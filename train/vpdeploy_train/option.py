"""A setting that a user can choose, declared once as a dataclass field: its default, meaning, range and sweep values.

Command line, files, checks and sweeps read the declaration; nothing about a setting is written twice.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vpdeploy.errors import SpecError

_KINDS = (int, float, bool, str)

_READ: dict[type, Mapping[str, Option]] = {}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The numbers that a setting may be; never infinite, never NaN.

    Attributes:
        low: The least.
        high: The greatest.
        low_open: Whether ``low`` itself is excluded.
        high_open: Whether ``high`` itself is excluded.
    """

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def hold(self, value: float) -> bool:
        """Tell whether a number lies within."""
        if isinstance(value, float) and not math.isfinite(value):
            return False
        above = value > self.low if self.low_open else value >= self.low
        return above and (value < self.high if self.high_open else value <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return "positive" if self.low_open and self.low == 0 else f"at least {self.low}"
        if not (self.low_open or self.high_open):
            return f"{self.low} to {self.high}"
        return f"in {'(' if self.low_open else '['}{self.low}, {self.high}{')' if self.high_open else ']'}"


POSITIVE = Limits(low=0, low_open=True)
NOT_NEGATIVE = Limits(low=0)
AT_LEAST_ONE = Limits(low=1)


def between(low: float, high: float) -> Limits:
    """Return the numbers from ``low`` to ``high``, both included."""
    return Limits(low=low, high=high)


def option(default: Any, text: str, *, limits: Limits | None = None, sweep: tuple[Any, ...] = ()) -> Any:
    """Declare a field of a dataclass as a setting.

    The field's type is ``int``, ``float``, ``bool``, ``str`` or a ``Literal`` of texts, whose members are then the
    choices; with ``| None`` where None, "not chosen", is its default. A number with a ``Literal`` beside it may be one
    of these words instead.

    Args:
        default: Its value where nobody chooses one; ``dataclasses.MISSING`` where somebody has to.
        text: What it means, for ``--help``.
        limits: The numbers it may be.
        sweep: The values that ``vpdeploy sweep`` tries by default; without any it is varied only on demand.
    """
    return field(default=default, metadata={"help": text, "limits": limits, "sweep": sweep})


@dataclass(frozen=True, kw_only=True)
class Option:
    """A setting as it was declared.

    Attributes:
        name: The field, and the key in TOML files.
        kind: ``int``, ``float``, ``bool`` or ``str``.
        optional: Whether it may be None.
        default: Its value where nobody chooses one; ``dataclasses.MISSING`` where somebody has to.
        help: What it means.
        choices: The texts it may be; empty where any will do.
        words: The texts that a number may be instead.
        limits: The numbers it may be; None where any will do.
        sweep: The values that a sweep tries by default.
    """

    name: str
    kind: type
    optional: bool
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    limits: Limits | None = None
    sweep: tuple[Any, ...] = ()

    @property
    def flag(self) -> str:
        """Its spelling on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def negated_name(self) -> str | None:
        """What ``flag`` is called where it switches off, as a name; None for what is not switched."""
        return f"no_{self.name}" if self.kind is bool else None

    def agrees_with(self, other: Option) -> bool:
        """Tell whether two methods mean the same by this setting; default and sweep values are each method's own."""
        return self.meaning == other.meaning

    @property
    def meaning(self) -> tuple[Any, ...]:
        """Everything that methods which share the setting have to agree on."""
        return (self.name, self.kind, self.optional, self.help, self.choices, self.words, self.limits)

    def typed(self, value: Any, *, origin: str = "") -> Any:
        """Return a value from a file or the command line as the setting's type; an integer serves as a float.

        Args:
            value: As it was read.
            origin: Stands before the message.

        Raises:
            SpecError: It is of another type.
        """
        if isinstance(value, str) and value in self.words:
            return value
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                raise SpecError(f"{origin}{self.flag}: the number is too large") from None
        if not isinstance(value, self.kind) or (isinstance(value, bool) and self.kind is not bool):
            expected = " or ".join([self.kind.__name__, *self.words])
            raise SpecError(f"{origin}{self.flag}: expected {expected}, found {value!r}")
        return value

    def parsed(self, text: str) -> Any:
        """Return what a text of the command line says of a number that may be a word.

        Raises:
            ValueError: It is neither.
        """
        return text if text in self.words else self.kind(text)

    def check_choice(self, value: Any) -> None:
        """Check that a text is one of the choices.

        Raises:
            SpecError: It is not.
        """
        if self.choices and value not in self.choices and not (value is None and self.optional):
            raise SpecError(f"{self.flag} '{value}': choose one of {', '.join(self.choices)}")

    def check_limits(self, value: Any) -> None:
        """Check that a number is within the limits.

        Raises:
            SpecError: It is not.
        """
        if self.limits is not None and value is not None and value not in self.words:
            expected = " or ".join([str(self.limits), *self.words])
            require(not isinstance(value, str) and self.limits.hold(value), self.flag, expected, value)


def options_of(declared: type) -> Mapping[str, Option]:
    """Return the settings that a dataclass declares, by name, in the order of its fields.

    Raises:
        TypeError: A field's type is none that a setting can have, or its help or limits are no such.
    """
    if declared not in _READ:
        hints = get_type_hints(declared)
        _READ[declared] = MappingProxyType(
            {
                each.name: _read(each.name, hints[each.name], each.default, each.metadata)
                for each in fields(declared)
                if "help" in each.metadata
            }
        )
    return _READ[declared]


def check_options(settings: object) -> None:
    """Check every setting of a dataclass: first all choices, then all limits.

    Raises:
        SpecError: A value is none that the setting may have.
    """
    options = options_of(type(settings)).values()
    for each in options:
        each.check_choice(getattr(settings, each.name))
    for each in options:
        each.check_limits(getattr(settings, each.name))


def require(holds: bool, flag: str, expected: str, found: object) -> None:
    """Refuse a value of which something does not hold.

    Raises:
        SpecError: It does not hold.
    """
    if not holds:
        raise SpecError(f"{flag} should be {expected}, found {found}")


def values_of(settings: Any) -> dict[str, Any]:
    """Return the settings of a dataclass by name."""
    return {name: getattr(settings, name) for name in options_of(type(settings))}


def _read(name: str, hint: Any, default: Any, metadata: Mapping[str, Any]) -> Option:
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = [part for part in parts if part is not type(None)]
    words = tuple(word for part in kinds[1:] if get_origin(part) is Literal for word in get_args(part))
    if words and kinds[0] in (int, float):
        kinds = kinds[:1]
    choices = get_args(kinds[0]) if get_origin(kinds[0]) is Literal else ()
    kind = str if choices and all(isinstance(choice, str) for choice in choices) else kinds[0]
    if len(kinds) != 1 or kind not in _KINDS:
        raise TypeError(f"setting '{name}' is a {hint}; expected int, float, bool, str or a Literal of texts")
    if not isinstance(metadata["help"], str):
        raise TypeError(f"setting '{name}' says {metadata['help']!r} for --help; expected a text")
    if not isinstance(metadata["limits"], Limits | None):
        raise TypeError(
            f"setting '{name}' has the limits {metadata['limits']!r}; expected Limits, such as between(0, 1)"
        )
    return Option(
        name=name,
        kind=kind,
        optional=len(parts) > 1 and default is None,
        default=default,
        help=metadata["help"],
        choices=choices,
        words=words,
        limits=metadata["limits"],
        sweep=tuple(metadata["sweep"]),
    )
