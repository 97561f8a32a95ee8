"""Turn results.csv into the table and the picture of docs/accuracy.md."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.accuracy.configurations import CONFIGURATIONS
from benchmarks.accuracy.table import RESULT_FILE, ResultRow, read_rows

BASELINE = "vpt-deep"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="the folder that run wrote")
    parser.add_argument("--markdown", type=Path, help="write the table here; default: standard output")
    parser.add_argument("--plot", type=Path, help="write a PNG: mean accuracy over tuned parameters")


def main(options: argparse.Namespace) -> int:
    rows = read_rows(options.out / RESULT_FILE)
    if not rows:
        print(f"{options.out / RESULT_FILE}: no rows; write them with run", file=sys.stderr)
        return 1
    setup = json.loads((options.out / "setup.json").read_text())
    text = render(rows, setup)
    if options.markdown:
        options.markdown.write_text(text + "\n")
    else:
        print(text)
    if options.plot:
        from benchmarks.accuracy.plot import plot_accuracy

        plot_accuracy(rows, options.plot)
    return 0


def render(rows: Sequence[ResultRow], setup: dict[str, object]) -> str:
    """Return the table in Markdown: accuracies in percent, mean ± standard deviation over seeds."""
    check_data(rows)
    tasks = list(dict.fromkeys(row.task for row in rows))
    names = [name for name in CONFIGURATIONS if any(row.configuration == name for row in rows)]
    lines = [
        f"{setup['backbone']} at {setup['image_size']} px, {setup['epochs']} epochs, batch {setup['batch_size']}, "
        f"{setup['precision']}, {setup['trials']} learning rate(s) tried on validation; images (train + val / test): "
        + ", ".join(f"{task} {split_sizes(rows, task)}" for task in tasks),
        "",
        f"| configuration | seeds | {' | '.join(tasks)} | mean | Δ {CONFIGURATIONS[BASELINE].title} "
        "| prompt parameters | tuned % | kB per task | GMAC per image |",
        "|" + "---|" * (len(tasks) + 8),
    ]
    for name in names:
        own = [row for row in rows if row.configuration == name]
        cells = [spread([100 * row.test_accuracy for row in own if row.task == task]) for task in tasks]
        means = seed_means(own, tasks)
        cells = [CONFIGURATIONS[name].title, str(len({row.seed for row in own})), *cells]
        cells += [spread([100 * mean for mean in means.values()]), difference(rows, name, tasks)]
        cells += [f"{statistics.mean(row.prompt_parameters for row in own):,.0f}"]
        cells += [f"{statistics.mean(row.tuned_percent for row in own):.3f}"]
        cells += [f"{statistics.mean(row.bytes for row in own) / 1000:.0f}"]
        cells += [f"{statistics.mean(row.macs for row in own) / 1e9:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def check_data(rows: Iterable[ResultRow]) -> None:
    """Refuse rows of one task that saw different images.

    Raises:
        ValueError: They did.
    """
    digests: dict[str, str] = {}
    for row in rows:
        if digests.setdefault(row.task, row.data) != row.data:
            raise ValueError(f"task {row.task}: rows of images {digests[row.task]} and {row.data} cannot be compared")


def split_sizes(rows: Iterable[ResultRow], task: str) -> str:
    row = next(row for row in rows if row.task == task)
    return f"{row.train_images} + {row.val_images} / {row.test_images}"


def seed_means(rows: Iterable[ResultRow], tasks: Sequence[str]) -> dict[int, float]:
    """Return the mean over tasks for every seed that has all of them."""
    by_seed: dict[int, dict[str, float]] = {}
    for row in rows:
        by_seed.setdefault(row.seed, {})[row.task] = row.test_accuracy
    return {seed: statistics.mean(found.values()) for seed, found in sorted(by_seed.items()) if set(found) == {*tasks}}


def difference(rows: Sequence[ResultRow], name: str, tasks: Sequence[str]) -> str:
    """Return the mean's distance to the baseline in points, paired by seed."""
    own, baseline = (seed_means([row for row in rows if row.configuration == each], tasks) for each in (name, BASELINE))
    shared = [seed for seed in own if seed in baseline]
    if name == BASELINE or not shared:
        return "—"
    return spread([100 * (own[seed] - baseline[seed]) for seed in shared], sign="+")


def spread(values: Sequence[float], *, sign: str = "") -> str:
    """Return mean ± sample standard deviation; a single value has none."""
    if not values:
        return "—"
    mean = f"{statistics.mean(values):{sign}.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"
