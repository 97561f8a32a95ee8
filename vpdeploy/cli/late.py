"""Verbs that learn the rest of their options only when they are about to run: finding those out loads much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Complete = Callable[[Sequence[str]], None]
"""Gives a verb the rest of its options, told the command line behind the verb."""

Verb = TypeVar("Verb", bound=Callable[..., Any])

_MARK = "__vpdeploy_complete__"


def completed_by(complete: Complete) -> Callable[[Verb], Verb]:
    """Mark a verb as one that a function completes before it runs; it is offered and described without."""

    def mark(verb: Verb) -> Verb:
        setattr(verb, _MARK, complete)
        return verb

    return mark


def complete_verb(verb: Callable[..., Any], arguments: Sequence[str]) -> None:
    """Give a verb the rest of its options; most verbs have them all.

    Args:
        verb: The function that the verb runs.
        arguments: The command line behind the verb.

    Raises:
        VpdeployError: The command line names something that there is not.
    """
    complete: Complete | None = getattr(verb, _MARK, None)
    if complete is not None:
        complete(arguments)
