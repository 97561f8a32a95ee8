from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy.report import render, seed_means, spread
from benchmarks.accuracy.table import ResultRow, ResultTable

SETUP = {"backbone": "vit", "image_size": 32, "epochs": 1, "batch_size": 8, "precision": "fp32", "trials": 1}


def row(**changes: Any) -> ResultRow:
    values = {
        "task": "fashion",
        "configuration": "vpt-deep",
        "seed": 0,
        "rate": 0.1,
        "chosen": "train",
        "val_accuracy": 0.5,
        "test_accuracy": 0.6,
        "train_images": 80,
        "val_images": 20,
        "test_images": 70,
        "prompt_parameters": 1000,
        "head_parameters": 200,
        "backbone_parameters": 9800,
        "bytes": 4000,
        "macs": 2_000_000,
        "seconds": 1.5,
        "data": "0123456789ab",
    }
    return ResultRow(**(values | changes))


def test_rows_survive_the_process_that_wrote_them(tmp_path: Path):
    path = tmp_path / "results.csv"
    ResultTable(path).add(row())
    ResultTable(path).add(row(seed=1, chosen="prune-2"))
    table = ResultTable(path)
    assert table.rows == [row(), row(seed=1, chosen="prune-2")]
    assert ("fashion", "vpt-deep", 1) in table
    assert ("fashion", "vpt-deep", 2) not in table
    assert ("fashion", "e2vpt", 1) not in table


def test_a_second_row_for_the_same_model_is_refused(tmp_path: Path):
    table = ResultTable(tmp_path / "results.csv")
    table.add(row())
    with pytest.raises(ValueError, match="has a row"):
        table.add(row(test_accuracy=0.9))


def test_tuned_percent_is_prompts_and_head_over_backbone_and_head():
    assert row().tuned_percent == pytest.approx(100 * 1200 / 10_000)


def test_mean_and_deviation_are_those_of_a_sample():
    assert spread([50.0, 60.0, 70.0]) == "60.0 ± 10.0"
    assert spread([61.0]) == "61.0"
    assert spread([]) == "—"


def test_the_mean_over_tasks_counts_only_seeds_that_have_all_of_them():
    rows = [row(), row(task="count", test_accuracy=0.8), row(seed=1)]
    assert seed_means(rows, ["fashion", "count"]) == {0: pytest.approx(0.7)}


def test_the_table_pairs_differences_by_seed():
    rows = [row(seed=seed, test_accuracy=accuracy) for seed, accuracy in ((0, 0.5), (1, 0.7), (2, 0.1))]
    rows += [
        row(configuration="e2vpt", seed=seed, test_accuracy=accuracy, prompt_parameters=500)
        for seed, accuracy in ((0, 0.52), (1, 0.76))  # the baseline's third seed has no partner
    ]
    line = next(line for line in render(rows, SETUP).splitlines() if "E²VPT, unpruned" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:] == ["2", "64.0 ± 17.0", "64.0 ± 17.0", "+4.0 ± 2.8", "500", "7.000", "4", "0.002"]


def test_rows_of_other_images_are_not_mixed():
    with pytest.raises(ValueError, match="cannot be compared"):
        render([row(), row(seed=1, data="ba9876543210")], SETUP)
