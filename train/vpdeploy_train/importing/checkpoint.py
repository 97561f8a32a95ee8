"""A torch file of the public code: read without unpickling objects, and accounted for key by key."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpdeploy.errors import SpecError
from vpdeploy_train.tensorfile import describe_file, read_torch_file

_PARALLEL = "module."  # what torch.nn.DataParallel puts before every key


class Checkpoint:
    """Tensors by key, each of which somebody has to take: a tensor that nobody reads would change what is computed.

    Args:
        source: What to call the file in an error, normally its path.
        tensors: The tensors by key.
    """

    def __init__(self, source: str, tensors: Mapping[str, Tensor]) -> None:
        self.source = source
        self._tensors = dict(tensors)
        self._taken: set[str] = set()

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """Read ``{"model": state_dict}`` or a plain state dict, with or without ``module.`` before its keys.

        Raises:
            SpecError: The file is missing, damaged, holds objects other than tensors, or no state dict.
        """
        if not path.is_file():
            raise SpecError(f"{path}: file not found; expected a torch file of the public VPT, E²VPT or VAPT code")
        try:
            content = read_torch_file(path)
        except Exception as error:  # a damaged zip, a pickle of objects and a short file raise three different kinds
            found = describe_file(path, error)
            raise SpecError(f"{path}: cannot be read as a torch file of tensors alone: {found}") from error
        return cls(str(path), _state_dict(path, content))

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys, in the file's order."""
        return tuple(self._tensors)

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def take(self, key: str, *sizes: int | str) -> Tensor:
        """Return a tensor as float32 and count it as read.

        Args:
            key: The tensor's key.
            sizes: The shape to expect: numbers have to match, letters stand for any size of at least 1, the same
                letter for the same size.

        Raises:
            SpecError: It is missing, of another shape, not of floating point, or not finite.
        """
        if key not in self._tensors:
            raise SpecError(
                f"{self.source}: key '{key}' is missing; check --format, or save the whole model's state_dict()"
            )
        stored = self._tensors[key]
        self._taken.add(key)
        if not stored.is_floating_point() or stored.layout != torch.strided or stored.is_meta:
            found = "meta" if stored.is_meta else stored.layout
            raise self._refused(key, f"is {stored.dtype}, {found}", "dense floating point numbers")
        if not _fits(tuple(stored.shape), sizes):
            expected = f"({', '.join(map(str, sizes))})"
            raise self._refused(key, f"has shape {tuple(stored.shape)}", f"{expected}: check --format and --backbone")
        if stored.numel() * stored.element_size() > stored.untyped_storage().nbytes():
            raise self._refused(key, "claims more numbers than the file holds", "a number for each element")
        value = stored.detach().to(torch.float32).contiguous()
        if not bool(torch.isfinite(value).all()):
            raise self._refused(key, "holds NaN or infinity", "finite float32 numbers: import another checkpoint")
        return value

    def require_all_taken(self) -> None:
        """Refuse keys that nobody has read.

        Raises:
            SpecError: Names the first of them.
        """
        left = [key for key in self._tensors if key not in self._taken]
        if left:
            more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
            raise SpecError(
                f"{self.source}: key '{left[0]}'{more} has no meaning here, and leaving it out would change the model; "
                "remove it if the model does not use it; docs/import.md lists what is read"
            )

    def _refused(self, key: str, found: str, expected: str) -> SpecError:
        return SpecError(f"{self.source}: '{key}' {found}; expected {expected}")


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not content:
        raise SpecError(f'{path}: holds no state dict; expected {{"model": state_dict}} or a plain state dict')
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise SpecError(
                f"{path}: '{key}' is a {type(value).__name__}; expected tensors only, in "
                '{"model": state_dict} or a plain state dict'
            )
    return _without_prefix(content)


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if all(key.startswith(_PARALLEL) for key in tensors):
        return {key.removeprefix(_PARALLEL): value for key, value in tensors.items()}
    return tensors


def _fits(shape: tuple[int, ...], sizes: tuple[int | str, ...]) -> bool:
    """Whether a shape matches numbers and letters."""
    if len(shape) != len(sizes) or math.prod(shape) == 0:
        return False
    letters: dict[int | str, int] = {}
    return all(
        found == size if isinstance(size, int) else letters.setdefault(size, found) == found
        for found, size in zip(shape, sizes, strict=True)
    )


def first_with(keys: Iterable[str], fragments: Iterable[str]) -> str | None:
    """Return the first key that holds one of the fragments, or None."""
    wanted = tuple(fragments)
    return next((key for key in keys if any(fragment in key for fragment in wanted)), None)
