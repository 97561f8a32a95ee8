"""What a benchmark found, and its form as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vpdeploy.bench.rounds import (
    Contest,
    Latency,
    Ratio,
    Settings,
    images_per_second,
    summarise_latency,
    summarise_ratio,
)
from vpdeploy.bench.subject import Cell, Subject, SubjectFacts
from vpdeploy.machine import Machine, describe_machine, peak_memory_bytes
from vpdeploy.text import align, bytes_text

UNKNOWN = "unknown"
ASKED_FOR = "asked for"

_COLUMNS = ("batch", "mix", "model", "rounds", "mean ms", "p50", "p90", "p99", "images/s")


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """What was measured of one subject in one cell.

    Attributes:
        subject: The subject's name.
        cell: Batch size and mix.
        rounds: Complete rounds.
        latency: How long one batch took.
        images_per_s: Images of all batches over the time of all batches.
        ratio: The subject's times over those of the one that it is compared with; None where it is not compared.
    """

    subject: str
    cell: Cell
    rounds: int
    latency: Latency
    images_per_s: float
    ratio: Ratio | None

    @classmethod
    def of(cls, contest: Contest, subject: int, name: str, *, against: int | None) -> CellResult:
        """Return what was measured.

        Args:
            contest: A cell with at least one complete round.
            subject: The subject's index.
            name: The subject's name.
            against: The index of the subject that it is compared with, or None.
        """
        seconds = contest.seconds(subject)
        return cls(
            subject=name,
            cell=contest.cell,
            rounds=len(seconds),
            latency=summarise_latency(seconds),
            images_per_s=images_per_second(contest.cell.batch, seconds),
            ratio=None if against is None else summarise_ratio(seconds, contest.seconds(against)),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the JSON form."""
        return {
            "subject": self.subject,
            "batch": self.cell.batch,
            "mix": self.cell.mix,
            "rounds": self.rounds,
            "latency_ms": self.latency.to_json(),
            "images_per_s": self.images_per_s,
            "ratio": None if self.ratio is None else self.ratio.to_json(),
        }


@dataclass(frozen=True, kw_only=True)
class BenchmarkReport:
    """What a benchmark found.

    Attributes:
        machine: The machine on which it ran.
        settings: How it was measured.
        interrupted: Whether it ended early.
        subjects: What was loaded: one, or two of which the first is compared with the second.
        peak_memory_bytes: The most memory that the process has held; None where the system does not tell.
        results: The cells with at least one complete round, and within each the subjects.
    """

    machine: Machine
    settings: Settings
    interrupted: bool
    subjects: tuple[SubjectFacts, ...]
    peak_memory_bytes: int | None
    results: tuple[CellResult, ...]

    @classmethod
    def of(
        cls, subjects: Sequence[Subject], contests: Sequence[Contest], settings: Settings, *, interrupted: bool
    ) -> BenchmarkReport:
        """Return the report of a measurement.

        Args:
            subjects: One, or two of which the first is compared with the second; they are still open.
            contests: What was measured; those without a complete round are left out.
            settings: How it was measured.
            interrupted: Whether it ended early.
        """
        return cls(
            machine=describe_machine(),
            settings=settings,
            interrupted=interrupted,
            subjects=tuple(subject.facts() for subject in subjects),
            peak_memory_bytes=peak_memory_bytes(),
            results=tuple(
                CellResult.of(contest, index, subject.name, against=1 if index == 0 and len(subjects) > 1 else None)
                for contest in contests
                if contest.rounds
                for index, subject in enumerate(subjects)
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the JSON form."""
        return {
            "machine": self.machine.to_json(),
            "settings": self.settings.to_json(),
            "interrupted": self.interrupted,
            "subjects": [subject.to_json() for subject in self.subjects],
            "peak_memory_bytes": self.peak_memory_bytes,
            "results": [result.to_json() for result in self.results],
        }


def render_benchmark(report: BenchmarkReport) -> str:
    """Return what was measured, on what, and a table of the results."""
    subjects = report.subjects
    lines = [*map(_subject_line, subjects), *_reasons(subjects), *_notes(report), "", *_table(report)]
    if report.interrupted:
        lines += ["", "stopped before the end; the rounds that were complete by then are shown"]
    return "\n".join(lines)


def _subject_line(subject: SubjectFacts) -> str:
    runtime = subject.runtime
    height, width = subject.image_size
    parts = [
        subject.kind,
        f"{runtime.name} {runtime.version}",
        f"threads {runtime.threads if runtime.threads is not None else 'as the runtime chooses'}",
        subject.precision or "precision " + UNKNOWN,
        f"opset {subject.opset if subject.opset is not None else UNKNOWN}",
        f"graph {bytes_text(subject.graph_bytes)}",
        f"image {subject.input} {height}x{width}",
    ]
    if subject.kind == "bundle":
        copies = f", {subject.copied_tasks} of them copies," if subject.copied_tasks else ""
        parts.append(f"{subject.tasks} tasks{copies} in a table of {bytes_text(subject.table_bytes)}")
    if runtime.engine is not None:
        parts.append(f"{bytes_text(runtime.engine.memory.total)} on the GPU")
        parts.append(f"engine {runtime.engine.file}")
    note = f" ({runtime.note})" if runtime.note else ""
    return f"{subject.name}: {', '.join(parts)}{note}"


def _reasons(subjects: Sequence[SubjectFacts]) -> list[str]:
    """Return why runtimes were chosen that nobody asked for by name, and batch sizes that were measured."""
    chosen: dict[str, str] = {}
    for each in subjects:
        if each.runtime.reason != ASKED_FOR:
            chosen.setdefault(each.runtime.name, each.runtime.reason)
    sizes = [
        f"serve takes batches of at most {each.batch_size.size}: {each.batch_size.reason}"
        for each in subjects
        if each.batch_size is not None
    ]
    return [*(f"why {runtime}: {reason}" for runtime, reason in chosen.items()), *dict.fromkeys(sizes)]


def _notes(report: BenchmarkReport) -> list[str]:
    machine = report.machine
    gpu = machine.gpu
    place = f"{machine.cpu}, {machine.cores} cores; "
    place += f"{gpu.name} ({gpu.sm})" if gpu is not None else f"GPU: {machine.gpu_obstacle}"
    peak = report.peak_memory_bytes
    return [place, f"peak memory of this process: {UNKNOWN if peak is None else bytes_text(peak)}"]


def _table(report: BenchmarkReport) -> list[str]:
    header = list(_COLUMNS)
    if with_ratio := len(report.subjects) > 1:
        header.append(f"time ratio to {report.subjects[1].name} (quartiles)")
    rows = []
    for result in report.results:
        latency, ratio = result.latency, result.ratio
        row = [str(result.cell.batch), result.cell.mix, result.subject, str(result.rounds)]
        row += [_ms(value) for value in (latency.mean, latency.p50, latency.p90, latency.p99)]
        row.append(_rate(result.images_per_s))
        if with_ratio:
            row.append("" if ratio is None else f"{ratio.median:.3f} ({ratio.q1:.3f}-{ratio.q3:.3f})")
        rows.append(row)
    left = [index for index, title in enumerate(header) if title in ("mix", "model") or title.startswith("time ratio")]
    return align([header, *rows], left=left)


def _ms(value: float) -> str:
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}"


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
