"""``--cache`` of the verbs that read many images: how much memory decoded ones may take."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

from vpdeploy.cli.sizes import parse_size

Cache: TypeAlias = Annotated[
    int | None,
    typer.Option(
        parser=parse_size,
        metavar="SIZE",
        help="Memory for decoded images, e.g. 2GiB; 0 keeps none. Default: half of what is free.",
    ),
]
"""``--cache`` of every verb that keeps decoded images."""
