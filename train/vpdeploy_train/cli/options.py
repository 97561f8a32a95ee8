"""One command-line option for every setting of ``TrainSettings`` and for every option of every method."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import MISSING
from typing import Annotated, Any, Final

import typer

from vpdeploy.cli.late import completed_by
from vpdeploy_train.cli.usage import read_usage
from vpdeploy_train.methods import METHODS
from vpdeploy_train.option import Option, options_of
from vpdeploy_train.settings import TrainSettings, usable_methods

logger = logging.getLogger("vpdeploy.train")

_A_METHODS_NUMBER: Final = Option(name="of_a_method", kind=int, optional=False, default=0, help="")


def add_options(
    verb: Callable[..., Any],
    *,
    check: Callable[[Sequence[str]], None],
    as_text: Callable[[Option], bool] = lambda option: False,
) -> None:
    """Give a verb that takes ``**options`` an option for every setting; None means that it was not given.

    The settings that all methods have are added at once, those of the methods themselves when the verb is about to
    run: they stand in the methods' files, which load torch. Before that, what the command line says is checked as far
    as it can be.

    Args:
        verb: The verb; its signature becomes the one that Typer reads.
        check: Raises where the command line behind the verb names something that there is not.
        as_text: Tells the settings whose option takes any text, e.g. because it may be a range.
    """
    own = inspect.signature(verb, eval_str=True)
    kept = [each for each in own.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    first = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in kept]
    first += [_parameter(each, as_text=as_text(each)) for each in options_of(TrainSettings).values()]

    def sign(parameters: list[inspect.Parameter]) -> None:
        setattr(verb, "__signature__", own.replace(parameters=parameters))  # noqa: B010 (typed away)
        verb.__annotations__ = {each.name: each.annotation for each in parameters}

    def complete(arguments: Sequence[str]) -> None:
        check(arguments)
        # Where other packages bring methods, their options are known only once these are loaded.
        if arguments and "--help" not in arguments and not METHODS.are_extended:
            values = read_usage(verb.__name__, first, arguments, numbers_are_text=as_text(_A_METHODS_NUMBER))
            for each in options_of(TrainSettings).values():
                if values[each.name] is not None and not as_text(each):
                    each.check_choice(values[each.name])
                    each.check_limits(values[each.name])
        sign([*first, *_method_parameters(as_text)])

    sign(first)
    completed_by(complete)(verb)


def tell_refused_methods() -> None:
    """Warn of installed methods that cannot be used, a line each; the others are not harmed by them."""
    for line in usable_methods().refusals.values():
        logger.warning("%s", line)


def _method_parameters(as_text: Callable[[Option], bool]) -> list[inspect.Parameter]:
    """Return a parameter for every option of a method, which names the methods that know it."""
    parameters = []
    for known in usable_methods().options().values():
        option = next(iter(known.values()))
        defaults = {method: each.default for method, each in known.items()}
        common = option.default if len({*defaults.values()}) == 1 else None
        text = ", ".join(known if common is not None else (f"{name} {value}" for name, value in defaults.items()))
        parameters.append(_parameter(option, as_text=as_text(option), about=f" ({text})", default=common))
    return parameters


def _parameter(option: Option, *, as_text: bool, about: str = "", default: Any = MISSING) -> inspect.Parameter:
    shown = option.default if default is MISSING else default
    text = option.help + about
    if shown not in (None, MISSING):
        text += f" [default: {shown}]"
    kind: Any = str if as_text or option.words else option.kind
    parser = option.parsed if option.words and not as_text else None
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            kind | None, typer.Option(help=text, show_default=False, parser=parser, metavar=_metavar(option))
        ],
    )


def _metavar(option: Option) -> str | None:
    return f"{option.kind.__name__.upper()}|{'|'.join(option.words)}" if option.words else None
