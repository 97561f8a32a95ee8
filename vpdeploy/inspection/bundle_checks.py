"""Checks of what is to be served: whether it is whole, what runs it here, and whether it fits into memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from vpdeploy.errors import VpdeployError
from vpdeploy.inspection.engines import EngineReport
from vpdeploy.inspection.finding import Finding
from vpdeploy.inspection.machine_checks import available_memory
from vpdeploy.inspection.report import WORKS, BundleReport, CardReport, EngineFileReport, FoldedReport, inspect_path
from vpdeploy.machine import find_gpu
from vpdeploy.text import bytes_text, shell_path


def check_path(path: Path) -> Iterator[Finding]:
    """Check a bundle, a run, an ONNX file or an engine."""
    subject = path.name or str(path)
    try:
        report = inspect_path(path)
    except (VpdeployError, OSError) as error:
        yield Finding(
            subject=subject,
            status="wrong",
            text=" ".join(str(error).split()),
            mend=f"vpdeploy export RUN --out {shell_path(path)}",
        )
        return
    if isinstance(report, BundleReport):
        what = f"bundle of {len(report.tasks)} tasks"
    elif isinstance(report, FoldedReport):
        what = f"folded model of task '{report.card.name}'"
    else:
        what = report.kind if isinstance(report, CardReport) else "engine"
    engines = report.host.engines if isinstance(report, (BundleReport, FoldedReport)) else ()
    damage = [each for each in report.damage if each not in [engine.misfit for engine in engines]]
    if not damage:
        yield Finding(subject=subject, status="ok", text=f"{what}, every file as it was written")
    for each in damage:
        yield Finding(
            subject=subject,
            status="wrong",
            text=" ".join(each.split()),
            mend=_cure(each, path),
        )
    if isinstance(report, EngineFileReport):
        yield from _engine_findings([report.engine], path.parent.parent)
    if isinstance(report, (BundleReport, FoldedReport)):
        yield from _engine_findings(list(engines), path)
        yield from _runtime_findings(dict(report.host.runtimes), path)
        yield from _memory_findings(path, report)


def _cure(damage: str, path: Path) -> str:
    """Return what mends a damaged file: a task alone can be put back, all else is copied or exported again."""
    task = re.search(r"[\\/]tasks[\\/]([^\\/:]+)[\\/]", damage)
    if task is None:
        return (
            f"copy {shell_path(path)} again from where it was exported, or vpdeploy export RUN --out {shell_path(path)}"
        )
    return f"vpdeploy task rollback {shell_path(path)} {task[1]}, or vpdeploy task add {shell_path(path)} RUN"


def _engine_findings(engines: list[EngineReport], path: Path) -> Iterator[Finding]:
    has_gpu = find_gpu() is not None
    for engine in engines:
        if engine.misfit is None:
            yield Finding(subject=engine.file, status="ok", text="the engine fits this machine")
            continue
        runtime = engine.card.runtime if engine.card is not None else "tensorrt-rtx"
        is_wrong = engine.is_damaged or has_gpu
        yield Finding(
            subject=engine.file,
            status="wrong" if is_wrong else "note",
            text=" ".join(engine.misfit.split()),
            mend=f"vpdeploy build {shell_path(path)} --runtime {runtime}" if is_wrong else None,
        )


def _runtime_findings(runtimes: dict[str, str], path: Path) -> Iterator[Finding]:
    working = [name for name, verdict in runtimes.items() if verdict == WORKS]
    for name, verdict in runtimes.items():
        if verdict != WORKS:
            yield Finding(subject=name, status="note", text=f"does not run it: {' '.join(verdict.split())}")
    if working:
        yield Finding(subject="runtimes", status="ok", text=f"it runs with {', '.join(working)}")
    else:
        yield Finding(
            subject="runtimes",
            status="wrong",
            text="nothing here runs it",
            mend=f"vpdeploy export RUN --out {shell_path(path)}   (without --bf16 for a CPU), or install a runtime",
        )


def _memory_findings(path: Path, report: BundleReport | FoldedReport) -> Iterator[Finding]:
    available = available_memory()
    needed = report.graph.size_bytes + (report.graph.data.size_bytes if report.graph.data is not None else 0)
    if isinstance(report, BundleReport):
        needed += sum(getattr(task, "size_bytes", 0) for task in report.tasks)
    if available is not None and needed > available:
        yield Finding(
            subject="memory",
            status="wrong",
            text=f"the weights and tasks take {bytes_text(needed)}, {bytes_text(available)} are left",
            mend="raise the container's limit, or close other programs",
        )
    folder = path if path.is_dir() else path.parent
    if not os.access(folder, os.W_OK):
        yield Finding(
            subject=str(folder),
            status="note",
            text="cannot be written: what runtimes build and measure at the first start is not kept for the next",
        )
