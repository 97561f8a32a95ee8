"""Methods by name, each loaded only where it is used: their files import torch, and their names are needed before."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, get_args

from vpdeploy.errors import SpecError
from vpdeploy_train.methods.options import MethodOptions, Part, Rates
from vpdeploy_train.option import Option, options_of

if TYPE_CHECKING:
    from vpdeploy_train.methods.method import PromptMethod

_ADVICE = "update or uninstall that package"


@dataclass(frozen=True, kw_only=True)
class LoadedMethods:
    """The methods that can be used, and why others cannot.

    Attributes:
        kinds: The classes, by name.
        refusals: One line for each method that is installed and cannot be used, by name.
    """

    kinds: Mapping[str, type[PromptMethod]]
    refusals: Mapping[str, str]

    def options(self) -> dict[str, dict[str, Option]]:
        """Return every option by name, and for each the methods that know it, with their own defaults."""
        found: dict[str, dict[str, Option]] = {}
        for method, kind in self.kinds.items():
            for name, each in options_of(kind.Options).items():
                found.setdefault(name, {})[method] = each
        return found


class MethodRegistry(Mapping[str, "type[PromptMethod]"]):
    """Every method that is installed: those of this package, and those that other packages bring by entry points.

    Names are known without loading anything.

    Args:
        built_in: This package's methods: ``MODULE:CLASS`` by name.
        group: The entry-point group by which other packages bring theirs, ``NAME = "MODULE:CLASS"``.
    """

    def __init__(self, built_in: Mapping[str, str], *, group: str) -> None:
        self._built_in = built_in
        self._group = group

    def __iter__(self) -> Iterator[str]:
        return iter(self._points)

    def __len__(self) -> int:
        return len(self._points)

    def __getitem__(self, name: str) -> type[PromptMethod]:
        """Load a method.

        Raises:
            KeyError: There is none of that name.
            SpecError: Its package is broken; the message names it.
        """
        point = self._points[name]
        if name in self._built_in:
            return _checked(point.load())
        if name in self._clashes:
            raise SpecError(self._clashes[name])
        try:
            return _checked(point.load())
        except (Exception, SystemExit) as error:  # whatever a foreign module does while it is imported
            raise SpecError(
                f"method '{name}' of package '{_package(point)}' cannot be loaded: "
                f"{type(error).__name__}: {' '.join(str(error).split())}; {_ADVICE}"
            ) from error

    @property
    def are_extended(self) -> bool:
        """Whether packages are installed that bring methods, or say so; none of them is loaded for it."""
        return bool(self._foreign)

    def require(self, name: str) -> None:
        """Check that there is a method of a name, without loading it.

        Raises:
            SpecError: There is none.
        """
        if name not in self._points:
            close = get_close_matches(name, self, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise SpecError(
                f"unknown method '{name}'{hint}; choose one of: {', '.join(self)}; "
                "or install the package that brings it"
            )

    def named(self, name: str) -> type[PromptMethod]:
        """Load a method by name.

        Raises:
            SpecError: There is none, or its package is broken.
        """
        self.require(name)
        return self[name]

    def load(self, *, reserved: Collection[str]) -> LoadedMethods:
        """Load every method; one that is broken, or whose options clash with those before it, is left out.

        Args:
            reserved: Names that no option may have, because others than methods use them.
        """
        kinds: dict[str, type[PromptMethod]] = {}
        refusals = dict(self._clashes)
        known: dict[str, Option] = {}
        for name, point in self._points.items():
            if name in self._clashes and name not in self._built_in:
                continue
            try:
                kind = self[name]
            except SpecError as error:
                refusals[name] = str(error)
                continue
            options = options_of(kind.Options)
            clash = next((each for each in options.values() if _clashes(each, known, reserved)), None)
            if clash is not None:
                refusals[name] = (
                    f"method '{name}' of package '{_package(point)}' means something else by {clash.flag} than "
                    f"vpdeploy or another method; {_ADVICE}"
                )
                continue
            kinds[name] = kind
            known = {**options, **known}
        return LoadedMethods(kinds=kinds, refusals=refusals)

    @functools.cached_property
    def _points(self) -> dict[str, EntryPoint]:
        """Where each method's class is: this package's first, then the others by name."""
        own = {name: EntryPoint(name, value, self._group) for name, value in self._built_in.items()}
        return own | {name: points[0] for name, points in self._foreign.items() if name not in own}

    @functools.cached_property
    def _foreign(self) -> dict[str, list[EntryPoint]]:
        """What other packages bring, by name; the same package found twice counts once."""
        found: dict[str, dict[str, EntryPoint]] = {}
        for point in entry_points(group=self._group):
            found.setdefault(point.name, {}).setdefault(_package(point), point)
        return {name: [packages[each] for each in sorted(packages)] for name, packages in sorted(found.items())}

    @functools.cached_property
    def _clashes(self) -> dict[str, str]:
        """One line for each name that more than one package brings; this package's own methods stay."""
        clashes = {}
        for name, points in self._foreign.items():
            packages = [f"'{_package(point)}'" for point in points]
            if name in self._built_in:
                clashes[name] = f"package {packages[0]} brings a method '{name}', which vpdeploy has itself: not used"
            elif len(packages) > 1:
                clashes[name] = (
                    f"method '{name}' is brought by packages {' and '.join(packages)}; uninstall all but one"
                )
        return clashes


def _clashes(option: Option, known: Mapping[str, Option], reserved: Collection[str]) -> bool:
    """Tell whether an option, or what switches it off, is spelled as something that means something else."""
    if option.name in reserved or (option.name in known and not option.agrees_with(known[option.name])):
        return True
    switches_off = {each.negated_name for each in known.values()} - {None}
    return option.name in switches_off or option.negated_name in {*known, *reserved}


def _package(point: EntryPoint) -> str:
    """Return the name of the distribution that an entry point belongs to."""
    try:
        name = None if point.dist is None else point.dist.name
    except Exception:  # an uninstallation left the entry points behind; Pythons differ in what they say of that
        name = None
    return name or "unknown"


def _checked(loaded: Any) -> type[PromptMethod]:
    """Return what an entry point names if it is a method.

    Raises:
        TypeError: It is not, or what it says of itself is of another type, or its options are not declared as options
            are.
        SpecError: An option's default is none that the option may have.
    """
    from vpdeploy_train.methods.method import Form, PromptMethod

    if not (isinstance(loaded, type) and issubclass(loaded, PromptMethod)):
        raise TypeError(f"{loaded!r} is no subclass of PromptMethod")
    # Without a decorator of its own, a class that inherits MethodOptions is a dataclass that lacks its own fields.
    options: Any = loaded.Options
    if not (
        isinstance(options, type) and issubclass(options, MethodOptions) and "__dataclass_fields__" in vars(options)
    ):
        raise TypeError(f"{loaded.__name__}.Options is no dataclass that inherits MethodOptions")
    undeclared = loaded.Options.__dataclass_fields__.keys() - options_of(loaded.Options).keys()
    if undeclared:
        raise TypeError(f"{loaded.__name__}.Options: declare '{min(undeclared)}' with vpdeploy_train.option.option")

    # Every option has a default, for a run may choose none of them.
    for each in options_of(options).values():
        if each.default is MISSING:
            raise TypeError(f"{loaded.__name__}.Options: '{each.name}' has no default")
        if not each.optional:
            each.typed(each.default)
    options()

    # What is asked of the class itself, by training and by export.
    if not isinstance(loaded.rates, Rates):
        raise TypeError(f"{loaded.__name__}.rates is {loaded.rates!r}; expected Rates")
    if loaded.form not in get_args(Form):
        raise TypeError(f"{loaded.__name__}.form is {loaded.form!r}; expected one of {', '.join(get_args(Form))}")
    if not {*loaded.parts} <= {*get_args(Part)}:
        raise TypeError(f"{loaded.__name__}.parts: expected some of {', '.join(get_args(Part))}")
    return loaded
