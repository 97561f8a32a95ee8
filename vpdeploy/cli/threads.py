"""CPU threads of the verbs: how many there are, and how they wait for each other."""

from __future__ import annotations

import os
from typing import Annotated, TypeAlias

import typer

Threads: TypeAlias = Annotated[
    int | None, typer.Option(min=1, max=65535, help="CPU threads; default: the runtime's choice.")
]
"""``--threads`` of every verb that computes."""


def let_waiting_threads_sleep() -> None:
    """Have OpenMP's threads sleep at their barriers unless the environment says how they should wait.

    By default they spin, and where another program wants the cores, each barrier then waits for the time slice of a
    thread that has been put aside: a training falls to a twentieth of its speed. OpenMP reads the variable when torch
    loads it, so it is set before any verb is; child processes inherit it.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
