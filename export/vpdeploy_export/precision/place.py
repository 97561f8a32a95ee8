"""A named value inside a block that is no layer's output."""

from __future__ import annotations

from torch import nn


class Place(nn.Identity):
    """Passes a value on. A probe hooks it; in the written graph it is nothing."""
