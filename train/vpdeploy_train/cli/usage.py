"""A command line read by Typer before the methods are loaded, so that a slip of the pen costs no seconds."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from vpdeploy_train import methods

_DECLARATION: Final = re.compile(r"^\s+(\w+): (\w+).* = option\(", re.MULTILINE)
_KINDS: Final[Mapping[str, Any]] = {"bool": bool, "int": int, "float": float}


def declared_options() -> dict[str, Any]:
    """Return the options of this package's methods as their sources declare them, without loading the methods.

    Returns:
        The type of each option by name: bool, int, float, or str for all else.
    """
    found: dict[str, Any] = {}
    for file in sorted(Path(methods.__file__).parent.glob("*.py")):
        for name, kind in _DECLARATION.findall(file.read_text(encoding="utf-8")):
            found.setdefault(name, _KINDS.get(kind, str))
    return found


def read_usage(
    verb: str, parameters: Sequence[inspect.Parameter], arguments: Sequence[str], *, numbers_are_text: bool
) -> dict[str, Any]:
    """Let Typer read a command line: options that there are not, values that are no numbers, values that lack.

    Args:
        verb: The verb's name.
        parameters: Its own options and those that all methods have.
        arguments: The command line behind the verb.
        numbers_are_text: Whether a method's number may be a range or a list.

    Returns:
        The values of the options by name; None where one is not given.

    Raises:
        Exception: Typer's error of usage.
    """
    read: dict[str, Any] = {}

    def keep(**values: Any) -> None:
        """Keep what was read."""
        read.update(values)

    taken = {each.name for each in parameters}
    guessed = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[(str if numbers_are_text and kind is not bool else kind) | None, typer.Option()],
        )
        for name, kind in declared_options().items()
        if name not in taken
    ]
    signature = inspect.Signature([*parameters, *guessed])
    setattr(keep, "__signature__", signature)  # noqa: B010 (typed away)
    keep.__annotations__ = {each.name: each.annotation for each in signature.parameters.values()}

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.callback()(lambda: None)  # with it, the verb keeps its name
    app.command(verb)(keep)
    app([verb, *arguments], prog_name="vpdeploy", standalone_mode=False)
    return read
