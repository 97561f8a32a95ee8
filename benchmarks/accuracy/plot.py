"""The picture of the table: mean accuracy over tuned parameters."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.accuracy.configurations import CONFIGURATIONS
from benchmarks.accuracy.report import seed_means
from benchmarks.accuracy.table import ResultRow
from vpdeploy.files import replacing_file


def plot_accuracy(rows: Sequence[ResultRow], path: Path) -> None:
    """Draw every configuration that has all tasks: mean over tasks, bars of one standard deviation over seeds."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for index, (name, configuration) in enumerate(CONFIGURATIONS.items()):
        own = [row for row in rows if row.configuration == name]
        means = [100 * mean for mean in seed_means(own, tasks).values()]
        if not means:
            continue
        tuned = statistics.mean(row.prompt_parameters + row.head_parameters for row in own)
        deviation = statistics.stdev(means) if len(means) > 1 else 0.0
        mean = statistics.mean(means)
        axes.errorbar(tuned, mean, deviation, fmt="o", capsize=4, color=f"C{index}", label=configuration.title)
    axes.set(
        xscale="log",
        xlabel="tuned parameters per task, head included",
        ylabel="test accuracy in percent, mean over tasks",
        title=", ".join(tasks),
    )
    axes.margins(0.2, 0.15)
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3, which="both")
    with replacing_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
