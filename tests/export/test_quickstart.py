"""What every verb that reports has in common, and how the quickstart reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vpdeploy.cli.main import build_app
from vpdeploy_export.quickstart.client import ServedAnswer
from vpdeploy_export.quickstart.quickstart import QuickstartResult, TaskResult

VERBS = ("train", "eval", "sweep", "import", "export", "verify", "convert", "build", "bench", "inspect", "predict")


@pytest.mark.parametrize("verb", [*VERBS, "quickstart"])
def test_every_verb_that_reports_does_so_in_json_when_asked(verb: str):
    shown = CliRunner().invoke(build_app([verb]), [verb, "--help"], catch_exceptions=False).output
    assert " --json " in shown


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
