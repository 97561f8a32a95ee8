"""Changes of type, written only where the type changes."""

from __future__ import annotations

import torch
from torch import Tensor


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a value in a type; a value that has it goes through without an operation."""
    return value if value.dtype == dtype else value.to(dtype)
