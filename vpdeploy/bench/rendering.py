"""A benchmark's report as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vpdeploy.text import align, bytes_text

UNKNOWN = "unknown"
ASKED_FOR = "asked for"

_COLUMNS = ("batch", "mix", "model", "rounds", "mean ms", "p50", "p90", "p99", "images/s")


def render_benchmark(report: dict[str, Any]) -> str:
    """Return what was measured, on what, and a table of the results."""
    subjects = report["subjects"]
    lines = [*map(_subject_line, subjects), *_reasons(subjects), *_notes(report), "", *_table(report)]
    if report["interrupted"]:
        lines += ["", "stopped before the end; the rounds that were complete by then are shown"]
    return "\n".join(lines)


def _subject_line(subject: dict[str, Any]) -> str:
    threads = subject.get("threads")
    parts = [
        subject["kind"],
        f"{subject['runtime']} {subject['runtime_version']}",
        f"threads {threads if threads is not None else 'as the runtime chooses'}",
        subject["precision"] or "precision " + UNKNOWN,
        f"opset {subject['opset'] if subject['opset'] is not None else UNKNOWN}",
        f"graph {bytes_text(subject['graph_bytes'])}",
        _image_text(subject),
    ]
    if subject["kind"] == "bundle":
        copies = f", {subject['copied_tasks']} of them copies," if subject["copied_tasks"] else ""
        parts.append(f"{subject['tasks']} tasks{copies} in a table of {bytes_text(subject['table_bytes'])}")
    if isinstance(memory := subject.get("memory_bytes"), dict) and "total" in memory:
        parts.append(f"{bytes_text(memory['total'])} on the GPU")
    if "engine" in subject:
        parts.append(f"engine {subject['engine']}")
    note = f" ({subject['note']})" if subject.get("note") else ""
    return f"{subject['name']}: {', '.join(parts)}{note}"


def _reasons(subjects: Sequence[dict[str, Any]]) -> list[str]:
    """Return why runtimes were chosen that nobody asked for by name."""
    chosen: dict[str, str] = {}
    for each in subjects:
        if each["reason"] != ASKED_FOR:
            chosen.setdefault(each["runtime"], each["reason"])
    return [f"why {runtime}: {reason}" for runtime, reason in chosen.items()]


def _image_text(subject: dict[str, Any]) -> str:
    size = subject["image_size"]
    height, width = size if isinstance(size, list) else (size, size)
    return f"image {subject['input']} {height}x{width}"


def _notes(report: dict[str, Any]) -> list[str]:
    machine = report["machine"]
    gpu = machine["gpu"]
    place = f"{machine['cpu']}, {machine['cores']} cores; "
    place += f"{gpu['name']} ({gpu['sm']})" if gpu is not None else f"GPU: {machine['gpu_obstacle']}"
    peak = report["peak_memory_bytes"]
    memory = f"peak memory of this process: {UNKNOWN if peak is None else bytes_text(peak)}"
    return [place, memory]


def _table(report: dict[str, Any]) -> list[str]:
    header = list(_COLUMNS)
    if with_ratio := len(report["subjects"]) > 1:
        header.append(f"time ratio to {report['subjects'][1]['name']} (quartiles)")
    rows = []
    for result in report["results"]:
        latency = result["latency_ms"]
        row = [str(result["batch"]), result["mix"], result["subject"], str(result["rounds"])]
        row += [_ms(latency[name]) for name in ("mean", "p50", "p90", "p99")]
        row.append(_rate(result["images_per_s"]))
        if with_ratio:
            ratio = result["ratio"]
            row.append("" if ratio is None else f"{ratio['median']:.3f} ({ratio['q1']:.3f}-{ratio['q3']:.3f})")
        rows.append(row)
    left = [index for index, title in enumerate(header) if title in ("mix", "model") or title.startswith("time ratio")]
    return align([header, *rows], left=left)


def _ms(value: float) -> str:
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}"


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
