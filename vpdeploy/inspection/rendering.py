"""A report as indented lines for people; ``--json`` has everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from vpdeploy.text import bytes_text, count_text

_MOST_ITEMS = 12
_TITLES = {"initializer_bytes": "weights", "macs_per_image": "multiply-accumulates per image"}
_COUNTS = ("parameters", "macs_per_image")


def render_text(report: dict[str, Any], indent: str = "") -> str:
    """Render a report; long lists are cut, equal blocks and big numbers are drawn together."""
    lines = []
    for key, value in report.items():
        title = _title(key)
        if key in _SHORT and _SHORT[key][0](value):
            lines.append(f"{indent}{title}: {_SHORT[key][1](value)}")
        elif isinstance(value, dict) and value:
            inner = {name: _sized(key, each) for name, each in value.items()} if key.endswith("_bytes") else value
            lines += [f"{indent}{title}:", render_text(inner, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines.append(f"{indent}{title}:")
            lines += [f"{indent}  - {_item(item)}" for item in value]
        else:
            lines.append(f"{indent}{title}: {_short(_sized(key, value))}")
    return "\n".join(lines)


def blocks_text(blocks: Sequence[dict[str, Any]]) -> str:
    """Return the precision of each block; neighbours of equal precision share one entry."""
    parts = []
    for kinds, group in groupby(blocks, key=lambda block: [item for item in block.items() if item[0] != "name"]):
        names = [str(block.get("name", "?")) for block in group]
        span = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        parts.append(f"{span}: " + ", ".join(f"{kind} {dtype}" for kind, dtype in kinds))
    return "; ".join(parts)


def _operators_text(operators: dict[str, int]) -> str:
    ranked = sorted(operators.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {count}" for name, count in ranked)


def _elements_text(elements: dict[str, int]) -> str:
    return ", ".join(f"{count_text(count)} {dtype}" for dtype, count in elements.items())


def _maxima_text(maxima: dict[str, dict[str, Any]]) -> str:
    """Return the largest of each block's values."""
    largest = {place: max(map(float, found.values()), default=0.0) for place, found in maxima.items()}
    return ", ".join(f"{place} {value:.3g}" for place, value in largest.items())


def _is_maxima(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(
            isinstance(found, dict) and all(isinstance(each, (int, float)) or each == "inf" for each in found.values())
            for found in value.values()
        )
    )


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _is_counts(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(count, int) for count in value.values())


_SHORT: dict[str, tuple[Callable[[Any], bool], Callable[[Any], str]]] = {
    "blocks": (_is_rows, blocks_text),
    "operators": (_is_counts, _operators_text),
    "elements": (_is_counts, _elements_text),
    "maxima": (_is_maxima, _maxima_text),
}
"""Sections with a form of their own: whether a value has the shape that it takes, and the form."""


def _item(item: dict[str, Any]) -> str:
    """Return one entry of a list; what is empty or unknown is left out."""
    shown = {name: value for name, value in item.items() if value not in (None, {}, [])}
    return ", ".join(f"{_title(name)} {_short(_sized(name, value))}" for name, value in shown.items())


def _title(key: str) -> str:
    # The unit stands beside the number.
    return _TITLES.get(key) or key.replace("_", " ").removesuffix(" bytes")


def _sized(key: str, value: Any) -> Any:
    """Return a size or a count with its unit, anything else as it is."""
    if isinstance(value, int) and not isinstance(value, bool):
        if key.endswith("_bytes"):
            return bytes_text(value)
        if key in _COUNTS:
            return count_text(value)
    return value


def _short(value: Any) -> str:
    """Return a value as text of bounded length."""
    if value in ({}, [], None):
        return "none"
    if isinstance(value, list):
        shown = ", ".join(_short(item) for item in value[:_MOST_ITEMS])
        return f"[{shown}{f', ... {len(value)} in all' if len(value) > _MOST_ITEMS else ''}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_short(each)}" for name, each in value.items()) + "}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
