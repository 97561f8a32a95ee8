from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from parity_files import import_case
from train.toys import TOY

from vpdeploy.errors import BundleCorruptError
from vpdeploy_train.results import TrainingResult
from vpdeploy_train.settings import TrainSettings
from vpdeploy_train.training import train_run


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, colours: Path, toy_weights: Path) -> TrainingResult:
    settings = TrainSettings.of(
        data=str(colours),
        backbone=TOY,
        weights=str(toy_weights),
        prompt_tokens=4,
        kv_tokens=2,
        epochs=1,
        device="cpu",
        keep="0.5,0.25",
    )
    return train_run(settings, tmp_path_factory.mktemp("runs") / "run", name="toy")


def test_a_stored_run_tells_the_results_that_its_training_returned(result: TrainingResult):
    stored = TrainingResult.read(result.run.path)
    assert stored.validation == result.validation
    assert stored.prompts == result.prompts
    assert stored.pruning == result.pruning
    assert stored.to_json() == result.to_json()


def test_the_pruning_file_and_the_card_hold_the_report_alike(result: TrainingResult):
    written = json.loads((result.run.path / "pruning.json").read_text())
    assert result.pruning is not None
    assert written == result.pruning.to_json() == result.run.card.details["pruning"]
    assert written["before"]["bytes"] == 4 * 2 * (4 + 2) * 32  # float32 · L · (T + T_KV) · D
    assert [row["keep"] for row in written["candidates"]] == [1.0, 0.5, 0.25]


def drop_loss(details: dict[str, Any]) -> None:
    del details["metrics"]["val_loss"]


def spell_accuracy(details: dict[str, Any]) -> None:
    details["metrics"]["val_accuracy"] = "high"


def choose_nobody(details: dict[str, Any]) -> None:
    details["pruning"]["chosen"] = "prune-9"


def cut_row(details: dict[str, Any]) -> None:
    del details["pruning"]["candidates"][1]["macs"], details["pruning"]["candidates"][1]["keep"]


def keep_twice(details: dict[str, Any]) -> None:
    details["pruning"]["kept"]["tokens"][0] = [0, 0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_loss, "metrics: field 'val_loss' is missing"),
        (spell_accuracy, "metrics: field 'val_accuracy' should be float, found str"),
        (choose_nobody, "pruning: field 'chosen' is 'prune-9', expected one of"),
        (cut_row, r"pruning: candidates\[1\]: field 'keep' is missing"),
        (keep_twice, "pruning: field 'kept'"),
    ],
)
def test_damaged_results_are_refused_by_the_name_of_the_field(
    result: TrainingResult, tmp_path: Path, damage: Callable[[dict[str, Any]], None], message: str
):
    path = Path(shutil.copytree(result.run.path, tmp_path / "run"))
    fields = json.loads((path / "task.json").read_text())
    damage(fields["task"]["details"])
    (path / "task.json").write_text(json.dumps(fields))
    with pytest.raises(BundleCorruptError, match=rf"task\.json: details: {message}"):
        TrainingResult.read(path)


def test_an_imported_run_has_no_training_to_tell_of(tmp_path: Path):
    run = import_case("vpt_deep_toy", "plain", tmp_path)
    with pytest.raises(BundleCorruptError, match="field 'metrics' is missing"):
        TrainingResult.read(run.path)
