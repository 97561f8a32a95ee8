"""``vpdeploy bench``: measure how fast an exported model runs here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vpdeploy.backends import AUTO
from vpdeploy.cli.runtimes import RuntimeOption
from vpdeploy.cli.signals import Stopped
from vpdeploy.cli.threads import Threads

if TYPE_CHECKING:
    from vpdeploy.bench.report import BenchmarkReport
    from vpdeploy.bench.rounds import Budget


def bench(
    path: Annotated[
        Path,
        typer.Argument(help="A bundle, an engine, or any .onnx file with one image input.", show_default=False),
    ],
    against: Annotated[
        Path | None, typer.Option(help="Measure this too, in turns, and compare PATH with it.", show_default=False)
    ] = None,
    runtime: RuntimeOption = AUTO,
    against_runtime: Annotated[
        str | None,
        typer.Option(help="Runtime of --against, auto by default; alone, PATH is compared with itself on it."),
    ] = None,
    threads: Threads = None,
    batch_sizes: Annotated[
        str | None, typer.Option(help="Comma list; default: 1,8,32, or what the file is fixed to.")
    ] = None,
    mix: Annotated[
        list[str] | None,
        typer.Option(
            help="Tasks of a batch's rows: one, uniform, zipf, distinct; a comma list, or repeated. Default: uniform, "
            "or one where there is one task."
        ),
    ] = None,
    tasks: Annotated[
        int | None, typer.Option(min=1, help="Tasks in a bundle's table: the first N, or filled up with copies.")
    ] = None,
    duration: Annotated[
        float | None, typer.Option(help="Seconds for each batch size and mix; default: 5.", show_default=False)
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Or rounds for each batch size and mix.")] = None,
    warm_up: Annotated[int, typer.Option(min=0, help="Runs beforehand that do not count.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of the images and tasks that are drawn.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw latency and throughput into a .png file.")] = None,
) -> None:
    """Measure latency and throughput of PATH, alone or in turns with another model."""
    import time

    from vpdeploy.bench.benchmark import Choice, run_benchmark
    from vpdeploy.bench.report import render_benchmark
    from vpdeploy.bench.rounds import Settings
    from vpdeploy.errors import SpecError
    from vpdeploy.progress import ProgressBar

    if duration is not None and count is not None:
        raise SpecError("--duration and --count exclude each other; give one of them")
    choices = [Choice(path=path, runtime=runtime)]
    if against is not None or against_runtime is not None:
        choices.append(Choice(path=against or path, runtime=against_runtime or AUTO))
    settings = Settings(
        batch_sizes=_parse_sizes(batch_sizes),
        mixes=tuple(name.strip() for names in mix or [] for name in names.split(",")),
        tasks=tasks,
        threads=threads,
        budget=_budget(duration, count),
        warm_up=warm_up,
        seed=seed,
    )
    draw = None if plot is None else _plotter(plot)
    try:
        with ProgressBar("measuring") as bar:
            report = run_benchmark(
                tuple(choices),
                settings,
                clock=time.perf_counter,
                on_round=lambda share: bar.show(share, "" if share else "warming up"),
            )
    except KeyboardInterrupt:
        raise Stopped("nothing was measured") from None
    typer.echo(json.dumps(report.to_json(), indent=2, ensure_ascii=False) if as_json else render_benchmark(report))
    if draw is not None and report.results:
        draw(report)
    if report.interrupted:
        raise Stopped("the report has what was measured by then")


def _parse_sizes(text: str | None) -> tuple[int, ...]:
    from vpdeploy.errors import SpecError

    if text is None:
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise SpecError(f"--batch-sizes {text}: expected numbers from 1 with commas between, e.g. 1,8,32") from None


def _budget(duration: float | None, count: int | None) -> Budget:
    from vpdeploy.bench.rounds import Budget
    from vpdeploy.errors import SpecError

    if count is not None:
        return Budget(duration_s=None, count=count)
    if duration is None:
        return Budget()
    if not 0 < duration < float("inf"):
        raise SpecError(f"--duration {duration}: expected seconds above 0")
    return Budget(duration_s=duration)


def _plotter(path: Path) -> Callable[[BenchmarkReport], None]:
    """Return what draws the report; before anything is measured, so that a missing library costs no time."""
    from vpdeploy.bench.picture import save_benchmark
    from vpdeploy.errors import SpecError

    if path.suffix.lower() != ".png":
        raise SpecError(f"--plot {path}: expected a name that ends in .png")
    return lambda report: save_benchmark(report, path)
