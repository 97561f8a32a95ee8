"""TensorRT 10.13's API over TensorRT-RTX's library: what 10.13 has not cannot be called through it.

TensorRT itself comes from NVIDIA's index alone and builds on a GPU alone. Its members are those that ``tensorrt-stubs``
lists, in ``tensorrt_10_13.json``; the library behind is the one that CI has.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

API: dict[str, Any] = json.loads(Path(__file__).with_name("tensorrt_10_13.json").read_text())
CLASSES: dict[str, dict[str, Any]] = API["classes"]

REMOVED_IN_11 = frozenset(
    {
        *(f"BuilderFlag.{name}" for name in ("FP16", "BF16", "INT8", "FP8", "INT4", "FP4", "DIRECT_IO")),
        *("BuilderFlag.OBEY_PRECISION_CONSTRAINTS", "BuilderFlag.PREFER_PRECISION_CONSTRAINTS"),
        *("IBuilderConfig.int8_calibrator", "IBuilderConfig.quantization_flags"),
    }
)
"""From TensorRT 11.4, "Removed Python APIs and Replacements"; the part that concerns building."""


def stand_in_module(real: ModuleType) -> ModuleType:
    """Return a module that looks like TensorRT 10.13 and works with another one's library."""
    module = ModuleType("tensorrt")
    module.__version__ = API["version"]  # type: ignore[attr-defined]
    for name in CLASSES:
        setattr(module, name, _stand_in(name, getattr(real, name)))
    return module


def _stand_in(name: str, real: Any) -> Any:
    if hasattr(real, "__members__"):
        return _Enumeration(name, real)
    # Classes to be derived from have to be the library's own.
    return real if name in ("ILogger", "IProgressMonitor") else _constructor(name, real)


class _Enumeration:
    """An enumeration of the library, of which only the members that both versions have can be taken."""

    def __init__(self, name: str, real: Any) -> None:
        self._name, self._real = name, real

    def __getattr__(self, member: str) -> Any:
        assert member == "__members__" or member in CLASSES[self._name], f"10.13 has no {self._name}.{member}"
        assert f"{self._name}.{member}" not in REMOVED_IN_11, f"11 has no {self._name}.{member}"
        return getattr(self._real, member)


class Checked:
    """An object of the library of whose members only those can be used that TensorRT's class of that name has."""

    def __init__(self, name: str, real: Any) -> None:
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_real", real)

    def __getattr__(self, member: str) -> Any:
        _require(self._name, member)
        value = getattr(self._real, member)
        overloads = CLASSES[self._name][member]
        if overloads is None:
            return _checked(value)

        def call(*arguments: Any) -> Any:
            fits = any(each["required"] <= len(arguments) <= len(each["parameters"]) for each in overloads)
            assert fits, f"{self._name}.{member} takes {overloads}, not {len(arguments)} arguments"
            return _checked(value(*map(_plain, arguments)))

        return call

    def __setattr__(self, member: str, value: Any) -> None:
        _require(self._name, member)
        assert CLASSES[self._name][member] is None, f"{self._name}.{member} is a method"
        setattr(self._real, member, _plain(value))


def _require(name: str, member: str) -> None:
    assert member in CLASSES[name], f"TensorRT {API['version']} has no {name}.{member}"
    assert f"{name}.{member}" not in REMOVED_IN_11, f"TensorRT 11 has no {name}.{member}"


def _constructor(name: str, real: Any) -> Any:
    return lambda *arguments: Checked(name, real(*map(_plain, arguments)))


def _plain(value: Any) -> Any:
    return value._real if isinstance(value, Checked) else value


def _checked(value: Any) -> Any:
    """Wrap what belongs to a class in use; serialized bytes and shapes stay as they are."""
    name = type(value).__name__
    checked = name in CLASSES and name not in ("IHostMemory", "Dims") and not hasattr(type(value), "__members__")
    return Checked(name, value) if checked else value
