"""Options from a file: what a verb takes on its command line, by name, in TOML.

The command line comes first, then the environment, then the file, then the default.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from vpdeploy.errors import SpecError
from vpdeploy.toml import name_advice, parse_toml

_OURS = ("config", "help")
"""What cannot stand in the file."""

_KUBERNETES = re.compile(r"SERVICE_|PORT_[0-9]")


def options_of(context: typer.Context) -> list[str]:
    """Return the names of a verb's options and arguments, as files and the environment spell them."""
    return [parameter.name for parameter in context.command.params if parameter.name not in (None, *_OURS)]


def _apply(context: typer.Context, path: Path | None) -> Path | None:
    """Make a file's values the defaults of the options that are not read yet: this one is read first."""
    check_variables(context, os.environ)
    if path is not None:
        context.default_map = {**(context.default_map or {}), **_read(path, options_of(context))}
    return path


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=_apply,
        is_eager=True,
        metavar="FILE.toml",
        help="Take options from a TOML file; the command line and the environment come first.",
    ),
]


def _read(path: Path, known: list[str]) -> dict[str, Any]:
    """Read options from a file.

    Raises:
        SpecError: The file cannot be read, names no option, or gives one a table.
    """
    try:
        fields = parse_toml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}; expected a TOML file of options") from None
    except (ValueError, RecursionError) as error:
        # A parser's words may quote the line, and with it a token.
        line = next(iter(re.findall(r"line \d+", str(error))), "")
        raise SpecError(f"{path}: not valid TOML{', ' + line if line else ''}") from None
    values: dict[str, Any] = {}
    for key, value in fields.items():
        name = key.replace("-", "_")
        if name not in known:
            raise SpecError(f"{path}: unknown option '{key[:40]}'; {name_advice(key, known)}")
        values[name] = _as_given(value, f"{path}: '{key}'")
    return values


def _as_given(value: Any, place: str) -> Any:
    """Return a value as the command line gives it, which reads sizes and paths from text."""
    if isinstance(value, bool):
        return value
    if isinstance(value, (str, int, float)):
        return str(value)
    if isinstance(value, list):
        return [_as_given(each, place) for each in value]
    raise SpecError(f"{place} should be text, a number, true, false or a list of these")


def check_variables(context: typer.Context, environment: Mapping[str, str]) -> None:
    """Look at the variables that have the verb's prefix.

    One that names no option is noted and no error: Kubernetes sets such for a service that is called like the verb.

    Raises:
        SpecError: One is empty, which would be taken for none: an empty token would serve openly.
    """
    prefix, known = f"{context.auto_envvar_prefix}_", [*options_of(context), "config"]
    for variable in sorted(each for each in environment if each.startswith(prefix)):
        name = variable.removeprefix(prefix)
        if name.lower() not in known:
            if not _KUBERNETES.match(name):
                typer.echo(f"note: {variable} sets no option; {name_advice(name, known)}", err=True)
        elif not environment[variable]:
            raise SpecError(f"{variable} is empty; set it to a value, or unset it for the default")
