"""A report as indented lines for people; ``--json`` has everything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from vpdeploy.format.task import TaskCard
from vpdeploy.inspection.engines import EngineReport
from vpdeploy.inspection.graph import GraphReport
from vpdeploy.inspection.report import (
    BundleReport,
    CardReport,
    DamagedTask,
    EngineFileReport,
    FoldedReport,
    HostReport,
    Inspection,
    TaskReport,
    shown_details,
)
from vpdeploy.machine import Machine
from vpdeploy.text import bytes_text, count_text

_MOST_ITEMS = 12
_TITLES = {"initializer_bytes": "weights", "macs_per_image": "multiply-accumulates per image"}
_COUNTS = ("parameters", "macs_per_image")


def render_text(report: Inspection) -> str:
    """Return a report as text; long lists are cut, equal blocks and big numbers are drawn together."""
    if isinstance(report, BundleReport):
        lines = _bundle_lines(report)
    elif isinstance(report, FoldedReport):
        lines = _folded_lines(report)
    elif isinstance(report, CardReport):
        lines = _task_folder_lines(report)
    else:
        lines = _engine_file_lines(report)
    if report.damage:
        lines += _listing("damage", report.damage)
    return "\n".join(lines)


def _bundle_lines(report: BundleReport) -> list[str]:
    layout = [
        _line("family", report.layout.family),
        _line("digest", report.layout.digest),
        *_section("tensors", [_line(_title(name), text) for name, text in report.tensors.items()]),
    ]
    return [
        _line("kind", "bundle"),
        _line("path", report.path),
        *_section("graph", _graph_lines(report.graph)),
        *_section("backbone", _free_lines(report.backbone.to_fields())),
        *_section("preprocessing", _free_lines(report.preprocessing.to_fields())),
        *_section("layout", layout),
        *_listing("tasks", [_task_item(task) for task in report.tasks]),
        *_host_lines(report.host),
    ]


def _folded_lines(report: FoldedReport) -> list[str]:
    return [
        _line("kind", "folded model"),
        _line("path", report.path),
        _line("input", report.input),
        *_section("graph", _graph_lines(report.graph)),
        *_card_lines(report.card),
        *_host_lines(report.host),
    ]


def _task_folder_lines(report: CardReport) -> list[str]:
    return [
        _line("kind", report.kind),
        _line("path", report.path),
        *_card_lines(report.card),
        *_section("files", [_line(_title(name), bytes_text(size)) for name, size in report.files.items()]),
        *([] if report.is_checked else [_line("digests of the files", "not recorded, so the files are not checked")]),
    ]


def _engine_file_lines(report: EngineFileReport) -> list[str]:
    card = report.card
    return [
        _line("kind", "engine"),
        _line("path", report.path),
        _line("file", report.engine.file),
        _line("runtime", card.runtime),
        _line("runtime version", card.runtime_version),
        _line("targets", list(card.targets)),
        _line("gpu name", card.gpu_name),
        _line("precision", card.precision),
        *_section("profile", [_line(_title(axis), str(sizes)) for axis, sizes in card.profile.ranges.items()]),
        _line("size", bytes_text(card.size_bytes)),
        _line("fits", report.engine.misfit is None),
        _line("reason", report.engine.misfit),
        _line("platform", card.platform),
        *_section("options", _free_lines(card.options.to_fields())),
        *_section("inputs", [_line(_title(name), text) for name, text in report.inputs.items()]),
        *_section("outputs", [_line(_title(name), text) for name, text in report.outputs.items()]),
        _line("graph sha256", card.graph_sha256),
        _line("layout digest", card.layout_digest),
        _line("sha256", card.sha256),
        _line("build seconds", card.build_seconds),
        *_section("machine", _machine_lines(report.machine)),
    ]


def _graph_lines(graph: GraphReport) -> list[str]:
    data = graph.data
    return [
        _line("file", graph.file),
        _line("size", bytes_text(graph.size_bytes)),
        *_section(
            "external data",
            [] if data is None else [_line("file", data.name), _line("size", bytes_text(data.size_bytes))],
        ),
        _line("precision", graph.precision),
        _line("opset", graph.opset),
        _line("sha256", graph.sha256),
        *_free_lines(graph.recorded),
    ]


def _card_lines(card: TaskCard) -> list[str]:
    return [
        _line("task", card.name),
        _line("method", card.method),
        _line("labels", list(card.labels)),
        *_section("backbone", _free_lines(card.backbone.to_fields())),
        *_section("preprocessing", _free_lines(card.preprocessing.to_fields())),
        *_free_lines(shown_details(card)),
    ]


def _host_lines(host: HostReport) -> list[str]:
    return [
        *_listing("engines", [_engine_item(engine) for engine in host.engines]),
        *_section("runtimes", [_line(name, verdict) for name, verdict in host.runtimes.items()]),
        *_section("machine", _machine_lines(host.machine)),
    ]


def _machine_lines(machine: Machine) -> list[str]:
    gpu = machine.gpu
    facts = (
        []
        if gpu is None
        else [
            _line("name", gpu.name),
            _line("sm", gpu.sm),
            _line("memory", bytes_text(gpu.memory_bytes)),
            _line("cuda version", gpu.cuda_version),
        ]
    )
    return [
        _line("cpu", machine.cpu),
        _line("cores", machine.cores),
        _line("system", machine.system),
        *_section("gpu", facts),
        _line("gpu obstacle", machine.gpu_obstacle),
    ]


def _task_item(task: TaskReport | DamagedTask) -> str:
    if isinstance(task, DamagedTask):
        return _item({"name": task.name, "version": task.version, "damaged": task.damage})
    return _item(
        {
            "name": task.name,
            "version": task.version,
            "method": task.method,
            "classes": task.classes,
            "prefix": task.prefix,
            "generated": task.generated,
            "size": bytes_text(task.size_bytes),
            "val accuracy": task.val_accuracy,
            "parity": dict(task.parity),
        }
    )


def _engine_item(engine: EngineReport) -> str:
    card = engine.card
    facts = (
        {}
        if card is None
        else {
            "runtime": card.runtime,
            "runtime version": card.runtime_version,
            "targets": list(card.targets),
            "gpu name": card.gpu_name,
            "precision": card.precision,
            "profile": {axis: str(sizes) for axis, sizes in card.profile.ranges.items()},
            "size": bytes_text(card.size_bytes),
        }
    )
    return _item({"file": engine.file, **facts, "fits": engine.misfit is None, "reason": engine.misfit})


def _line(title: str, value: Any) -> str:
    return f"{title}: {_short(value)}"


def _section(title: str, lines: Sequence[str]) -> list[str]:
    """Return lines under a title, indented."""
    return [f"{title}:", *(f"  {line}" for line in lines)] if lines else [f"{title}: none"]


def _listing(title: str, items: Sequence[str]) -> list[str]:
    """Return items under a title, one a line."""
    return _section(title, [f"- {item}" for item in items])


def _free_lines(fields: Mapping[str, Any]) -> list[str]:
    """Return the lines of fields whose form is not known: what training and export recorded, and JSON forms."""
    lines = []
    for key, value in fields.items():
        title = _title(key)
        if key in _SHORT and _SHORT[key][0](value):
            lines.append(f"{title}: {_SHORT[key][1](value)}")
        elif isinstance(value, dict) and value:
            inner = {name: _sized(key, each) for name, each in value.items()} if key.endswith("_bytes") else value
            lines += _section(title, _free_lines(inner))
        elif _is_rows(value):
            items = [{_title(name): _sized(name, each) for name, each in item.items()} for item in value]
            lines += _listing(title, [_item(item) for item in items])
        else:
            lines.append(_line(title, _sized(key, value)))
    return lines


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


def _item(facts: Mapping[str, Any]) -> str:
    """Return one entry of a list from its facts by title; what is empty or unknown is left out."""
    shown = {title: value for title, value in facts.items() if value not in (None, {}, [])}
    return ", ".join(f"{title} {_short(value)}" for title, value in shown.items())


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
