from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from core import toy
from typer.testing import CliRunner

from vpdeploy.cli.main import build_app
from vpdeploy.format.bundle import withdraw_task
from vpdeploy.format.holds import Holds, version_name

Run = Callable[..., str]


@pytest.fixture
def run() -> Run:
    def call(*arguments: object) -> str:
        result = CliRunner().invoke(build_app(), [str(each) for each in arguments], catch_exceptions=False)
        assert result.exit_code == 0
        return result.stdout

    return call


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """A bundle in which a command was killed while it published version 2 of ``flowers``."""
    path = toy.write(tmp_path / "zoo").path
    (path / "tasks/flowers/2").mkdir()
    (path / "tasks/flowers/2/task.json").write_bytes(b"0123456789")
    return path


def test_gc_tells_what_it_would_remove_and_then_removes_it(zoo: Path, run: Run):
    left = {"path": str(zoo / "tasks/flowers/2"), "size_bytes": 10}
    expected = {"path": str(zoo), "dry_run": True, "removed": [left], "freed_bytes": 10, "held": []}
    assert json.loads(run("gc", zoo, "--dry-run", "--json")) == expected
    assert "tasks/flowers/2: 0.0 MB, would be removed" in run("gc", zoo, "--dry-run")
    assert json.loads(run("gc", zoo, "--json")) == {**expected, "dry_run": False}
    assert not (zoo / "tasks/flowers/2").exists()
    assert run("gc", zoo) == f"{zoo}: 0 leftovers, 0.0 MB\n"


@pytest.mark.skipif(sys.platform != "linux", reason="holds are locks that Linux has")
def test_gc_names_what_a_running_process_holds(zoo: Path, run: Run):
    holds = Holds(zoo, lambda: [version_name("birds", 1)])
    holds.refresh()
    withdraw_task(zoo, "birds")
    assert "tasks/birds/1: 0.0 MB, held by a running process" in run("gc", zoo)
    assert [each["path"] for each in json.loads(run("gc", zoo, "--json"))["held"]] == [str(zoo / "tasks/birds/1")]
    holds.close()
    assert "tasks/birds/1: 0.0 MB, removed" in run("gc", zoo)
