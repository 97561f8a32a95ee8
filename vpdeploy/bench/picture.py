"""A benchmark's report as a picture; needs Matplotlib, which comes with the train extra."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, StrMethodFormatter

from vpdeploy.bench.report import BenchmarkReport, CellResult
from vpdeploy.files import replacing_file

_STYLES = ("-", "--", ":", "-.")


def draw_benchmark(report: BenchmarkReport) -> Figure:
    """Draw latency (line: median, band: up to the 90th percentile) and images per second over the batch size.

    A subject has one colour, a mix one style of line.
    """
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    latency, throughput = figure.subplots(1, 2)
    lines = lines_of(report)
    subjects = list(dict.fromkeys(subject for subject, _ in lines))
    mixes = list(dict.fromkeys(mix for _, mix in lines))
    batch_sizes = sorted({result.cell.batch for result in report.results})
    for (subject, mix), results in lines.items():
        colour, style = f"C{subjects.index(subject)}", _STYLES[mixes.index(mix) % len(_STYLES)]
        batches = [result.cell.batch for result in results]
        p50 = [result.latency.p50 for result in results]
        p90 = [result.latency.p90 for result in results]
        latency.fill_between(batches, p50, p90, color=colour, alpha=0.15, lw=0)
        if len(batches) == 1:  # a band over one batch size has no width
            latency.errorbar(batches, p50, yerr=[[0], [p90[0] - p50[0]]], color=colour, capsize=4)
        latency.plot(batches, p50, color=colour, ls=style, marker="o", ms=4)
        rates = [result.images_per_s for result in results]
        title = subject if len(mixes) == 1 else f"{subject}, {mix}"
        throughput.plot(batches, rates, color=colour, ls=style, marker="o", ms=4, label=title)
    latency.set(title="time of one batch (line: median, band: up to p90)", ylabel="ms")
    throughput.set(title="throughput", ylabel="images/s", ylim=(0, None))
    for axes in (latency, throughput):
        _number_batches(axes, batch_sizes)
    if len(batch_sizes) > 1:  # times grow with the batch, so a linear scale would hide those of small ones
        _scale_by_decades(latency)
    else:
        latency.set(ylim=(0, None))
    throughput.legend()
    figure.suptitle(_place(report), fontsize=9)
    return figure


def save_benchmark(report: BenchmarkReport, path: Path) -> None:
    """Write the picture as a PNG, whole or not at all.

    Raises:
        OSError: The folder cannot be written.
    """
    with replacing_file(path) as temporary:
        draw_benchmark(report).savefig(temporary, format="png", dpi=110, metadata={"Software": None})


def lines_of(report: BenchmarkReport) -> dict[tuple[str, str], list[CellResult]]:
    """Return the results of each subject and mix, ascending by batch size."""
    lines: dict[tuple[str, str], list[CellResult]] = {}
    for result in sorted(report.results, key=lambda each: each.cell.batch):
        lines.setdefault((result.subject, result.cell.mix), []).append(result)
    return lines


def _number_batches(axes: Axes, batches: list[int]) -> None:
    axes.set(xlabel="batch size", xscale="log")
    axes.xaxis.set_major_locator(FixedLocator(batches))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axes.grid(alpha=0.3)


def _scale_by_decades(axes: Axes) -> None:
    axes.set(yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _place(report: BenchmarkReport) -> str:
    machine = report.machine
    runtimes = dict.fromkeys(f"{each.runtime.name} {each.runtime.version}" for each in report.subjects)
    places = [machine.gpu.name] if machine.gpu is not None else []
    return "  ·  ".join([*runtimes, *places, f"{machine.cpu}, {machine.cores} cores"])
