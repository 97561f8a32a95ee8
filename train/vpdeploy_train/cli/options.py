"""One command-line option for every field of ``TrainSettings``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import MISSING, fields
from typing import Annotated, Any

import typer

from vpdeploy_train.settings import TrainSettings

_DATA_HELP = (
    "folder, .csv/.json/.jsonl manifest, vtab:DIR, hf:NAME, digits[:TASK] or shapes:TASK; "
    "with #final behind it, train on the validation images, too"
)


def setting_options(*, as_text: Collection[str] = ()) -> list[inspect.Parameter]:
    """Return one keyword parameter for every setting; None means that the option was not given.

    Args:
        as_text: Settings whose option takes any text, e.g. because it may be a range.
    """
    kinds = {"int": int, "float": float, "bool": bool}
    parameters = []
    for setting in fields(TrainSettings):
        kind = str if setting.name in as_text else kinds.get(str(setting.type).partition(" |")[0], str)
        text = setting.metadata.get("help", _DATA_HELP)
        if setting.default not in (None, MISSING):
            text += f" [default: {setting.default}]"
        option = typer.Option(help=text, show_default=False)
        parameters.append(
            inspect.Parameter(
                setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
            )
        )
    return parameters


def add_options(verb: Callable[..., Any], parameters: list[inspect.Parameter]) -> None:
    """Give a verb that takes ``**options`` the signature that Typer reads: its own parameters, then the others."""
    own = inspect.signature(verb, eval_str=True)
    kept = [each for each in own.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    keyword_only = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in kept]
    setattr(verb, "__signature__", own.replace(parameters=[*keyword_only, *parameters]))  # noqa: B010 (typed away)
    verb.__annotations__ = {each.name: each.annotation for each in [*keyword_only, *parameters]}
