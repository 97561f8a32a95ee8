"""What every verb that reports has in common, and how the quickstart reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from train.toys import TOY, write_colours, write_weights
from typer.testing import CliRunner

from vpdeploy.cli.main import build_app
from vpdeploy_export.quickstart.client import ServedAnswer
from vpdeploy_export.quickstart.quickstart import QuickstartResult, TaskResult
from vpdeploy_export.quickstart.training import train_quietly
from vpdeploy_train.backbone import load_backbone
from vpdeploy_train.run import Run
from vpdeploy_train.settings import TrainSettings

VERBS = ("train", "eval", "sweep", "import", "export", "verify", "convert", "build", "bench", "inspect", "predict")


@pytest.mark.parametrize("verb", [*VERBS, "quickstart"])
def test_every_verb_that_reports_does_so_in_json_when_asked(verb: str):
    shown = CliRunner().invoke(build_app([verb, "--help"]), [verb, "--help"], catch_exceptions=False).output
    assert " --json " in shown


def test_a_training_of_the_quickstart_is_told_in_two_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
):
    weights = write_weights(tmp_path / "toy.safetensors")
    settings = TrainSettings.of(
        **{"data": str(write_colours(tmp_path / "colours")), "backbone": TOY, "weights": str(weights), "epochs": 1},
        **{"prompt_tokens": 2, "kv_tokens": 1, "batch_size": 16, "device": "cpu", "prune": True, "keep": "0.5"},
    )
    told: list[str] = []
    with caplog.at_level("INFO"):
        train_quietly(settings, tmp_path / "toy", backbone=load_backbone(TOY, weights=weights), say=told.append)
    assert [line.split()[0] for line in told] == ["chosen:", "pruned:"]
    assert [each.getMessage() for each in caplog.records if each.name.startswith("vpdeploy")] == []
    assert capsys.readouterr().err == ""
    assert Run.read(tmp_path / "toy").card.name == "toy"


def test_the_quickstarts_json_holds_what_its_table_shows(tmp_path: Path):
    row = TaskResult(
        name="digit",
        about="which digit",
        accuracy=0.9,
        probe_accuracy=0.8,
        prompts=(36, 72),
        size_bytes=1000,
        latency_ms=1.5,
        extra_macs_as_tokens=0.1,
        extra_macs_folded=-0.1,
    )
    result = QuickstartResult(
        rows=(row,),
        answers=(ServedAnswer(task="digit", label="3", latency_ms=2.0),),
        right=1,
        seconds=12.34,
        bundle=tmp_path / "zoo",
        folded=tmp_path / "digit.onnx",
    )
    fields = json.loads(json.dumps(result.to_fields()))
    assert fields["tasks"][0]["prompts"] == {"kept": 36, "begun": 72}
    assert (fields["tasks"][0]["accuracy"], fields["tasks"][0]["latency_ms"]) == (0.9, 1.5)
    assert (fields["served"], fields["seconds"]) == ({"images": 1, "right": 1}, 12.3)
    assert fields["bundle"] == str(tmp_path / "zoo")
