"""``--runtime`` of the verbs that run a graph, as the registry names them."""

from __future__ import annotations

from typing import Annotated

import typer

from vpdeploy.backends import AUTO, RUNTIMES

RuntimeOption = Annotated[str, typer.Option(help=f"{AUTO}: the fastest that works; or {', '.join(RUNTIMES)}.")]
"""A name in ``vpdeploy.backends.RUNTIMES``, or ``auto``."""
