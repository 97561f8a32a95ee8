"""Sweeps end to end: enough trials, continued after any interruption, shared by processes, the best published."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna", reason="needs the sweep extra")

from optuna.trial import TrialState
from PIL import Image
from train.test_training import Interrupt, Quiet, quiet
from train.toys import TOY, write_colours
from typer.testing import CliRunner

from vpdeploy.cli import exits
from vpdeploy.cli.main import build_app
from vpdeploy.errors import SpecError, TrainingError
from vpdeploy_train.config import read_toml
from vpdeploy_train.evaluation import evaluate_run
from vpdeploy_train.loop import fit
from vpdeploy_train.run import Run
from vpdeploy_train.settings import TrainSettings
from vpdeploy_train.state import EpochRow
from vpdeploy_train.sweep.claims import reclaim
from vpdeploy_train.sweep.space import Choices, Interval
from vpdeploy_train.sweep.study import make_pruner, opened_study
from vpdeploy_train.sweep.sweeping import SweepPlan, run_sweep
from vpdeploy_train.training import train_run

SPACE = {
    "lr": Interval(low=0.01, high=3.0, log=True, whole=False),
    "prompt_tokens": Choices(values=(1, 2)),
}


@pytest.fixture(autouse=True)
def _without_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "pictures" not in request.fixturenames:
        draw_nothing(monkeypatch)


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("vpdeploy_train.sweep.results.plot_study", lambda *_: None)
    patch.setattr("vpdeploy_train.training.plot_curves", lambda _, path: path.touch())


@pytest.fixture
def pictures() -> None:
    """Let a test's sweeps draw their pictures."""


@pytest.fixture
def plan(colours: Path, toy_weights: Path, tmp_path: Path) -> SweepPlan:
    settings = TrainSettings.of(
        data=str(colours),
        backbone=TOY,
        weights=str(toy_weights),
        kv_tokens=1,
        epochs=2,
        batch_size=16,
        device="cpu",
        prune=False,
    )
    return SweepPlan(settings=settings, space=SPACE, out=tmp_path / "sweep", trials=3, pruner="none")


def sweep(plan: SweepPlan, **options: Any) -> Any:
    return run_sweep(plan, make_progress=options.get("make_progress", quiet))


def table(out: Path) -> list[dict[str, str]]:
    with (out / "trials.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def states(out: Path) -> list[str]:
    return [row["state"] for row in table(out)]


@pytest.mark.usefixtures("pictures")
def test_a_sweep_publishes_the_trial_that_is_best_on_validation(plan):
    result = sweep(replace(plan, trials=4))
    rows = table(plan.out)
    assert [row["state"] for row in rows] == ["complete"] * 4
    assert result.states == {"complete": 4}
    best = max(rows, key=lambda row: (float(row["val_accuracy"]), -float(row["val_loss"])))
    assert str(result.best) == best["trial"]
    assert result.val_accuracy == float(best["val_accuracy"])
    run = Run.read(result.best_run)
    assert run.card.details["metrics"]["val_accuracy"] == result.val_accuracy
    evaluated = evaluate_run(run, split="val").evaluation
    assert evaluated.accuracy == pytest.approx(result.val_accuracy)
    assert json.loads(json.dumps(result.to_json()))["best"]["trial"] == result.best
    assert len({row["lr"] for row in rows}) == 4
    for row in rows:
        assert 0.01 <= float(row["lr"]) <= 3.0
        assert row["prompt_tokens"] in ("1", "2")
        assert (plan.out / "trials" / f"{int(row['trial']):04}" / "task.json").is_file()
    for name in ("history.png", "slices.png"):
        with Image.open(plan.out / name) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 10


def test_the_best_settings_train_the_best_run_again(plan, tmp_path):
    result = sweep(plan)
    settings = TrainSettings.merge(read_toml(plan.out / "best.toml"))
    train_run(settings, tmp_path / "again", name="sweep", make_progress=quiet)
    mine = (result.best_run / "prompts.safetensors").read_bytes()
    assert mine == (tmp_path / "again" / "prompts.safetensors").read_bytes()


def test_a_sweep_never_decodes_the_test_images(plan, tmp_path):
    root = write_colours(tmp_path / "split" / "train")
    write_colours(tmp_path / "split" / "test")
    for path in (tmp_path / "split" / "test").rglob("*.png"):
        path.write_bytes(b"not an image")
    assert root.is_dir()
    result = sweep(replace(plan, settings=replace(plan.settings, data=str(tmp_path / "split")), trials=1))
    assert result.states == {"complete": 1}


def test_a_finished_sweep_stays_and_a_longer_one_goes_on(plan):
    first = sweep(replace(plan, trials=1))
    assert sweep(replace(plan, trials=1)) == first
    sweep(replace(plan, trials=3))
    assert states(plan.out) == ["complete"] * 3
    whole = replace(plan, out=plan.out.with_name("whole"))
    sweep(whole)
    assert [row["lr"] for row in table(plan.out)] == [row["lr"] for row in table(whole.out)]
    assert [row["val_loss"] for row in table(plan.out)] == [row["val_loss"] for row in table(whole.out)]


def test_an_interrupted_trial_is_continued_with_its_values(plan):
    begun: list[tuple[str, int]] = []

    def interrupt_second(phase: str, images: int, done: int) -> Quiet:
        begun.append((phase, done))
        return Interrupt("epoch", 1) if phase == "trial 1: train" else Quiet()

    with pytest.raises(KeyboardInterrupt):
        sweep(plan, make_progress=interrupt_second)
    sweep(plan, make_progress=interrupt_second)
    assert states(plan.out) == ["complete", "fail", "complete", "complete"]
    rows = table(plan.out)
    assert (rows[1]["lr"], rows[1]["prompt_tokens"]) == (rows[2]["lr"], rows[2]["prompt_tokens"])
    assert not (plan.out / "trials" / "0001").exists()
    done = dict(begun)
    assert done["trial 1: train"] == 0 < done["trial 2: train"] < done["trial 2: train"] * 2


CHILD = """
import sys
from dataclasses import replace
from pathlib import Path
import pytest
import train.toys
from train.test_sweep import SPACE, draw_nothing
from train.test_training import Quiet
from vpdeploy_train.config import read_toml
from vpdeploy_train.settings import TrainSettings
from vpdeploy_train.sweep.sweeping import SweepPlan, run_sweep

class Die(Quiet):
    def on_epoch(self, row):
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)

draw_nothing(pytest.MonkeyPatch())
print("ready", flush=True)
settings = TrainSettings.merge(read_toml(Path(sys.argv[1])))
plan = SweepPlan(settings=settings, space=SPACE, out=Path(sys.argv[2]), trials=int(sys.argv[3]), pruner="none")
run_sweep(plan, make_progress=lambda *_: Die() if sys.argv[4] == "die" else Quiet())
"""


def start(plan: SweepPlan, manner: str) -> subprocess.Popen[bytes]:
    plan.out.parent.mkdir(parents=True, exist_ok=True)
    config = plan.out.with_suffix(".toml")
    config.write_text(plan.settings.to_toml(), encoding="utf-8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    arguments = [str(config), str(plan.out), str(plan.trials), manner]
    command = [sys.executable, "-c", CHILD, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_trial_whose_process_was_killed_is_continued(plan):
    child = start(plan, "die")
    _, log = child.communicate(timeout=200)
    assert child.returncode == -9, log.decode()
    sweep(plan)
    assert states(plan.out) == ["fail", "complete", "complete", "complete"]
    rows = table(plan.out)
    assert rows[0]["lr"] == rows[1]["lr"]


def test_two_processes_share_a_sweep(plan):
    """This process and another one, which begin together."""
    plan = replace(plan, trials=6)
    child = start(plan, "live")
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    sweep(plan)
    _, log = child.communicate(timeout=250)
    assert child.returncode == 0, log.decode()
    assert states(plan.out) == ["complete"] * 6
    assert len({row["lr"] for row in table(plan.out)}) == 6
    assert (plan.out / "best" / "task.json").is_file()


def test_a_trial_that_diverges_counts_and_the_sweep_goes_on(plan, monkeypatch):
    calls: list[int] = []

    def diverge_first(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise TrainingError("the loss is nan")
        return fit(*arguments, **options)

    monkeypatch.setattr("vpdeploy_train.workbench.fit", diverge_first)
    sweep(plan)
    assert states(plan.out) == ["fail", "complete", "complete"]
    assert table(plan.out)[0]["error"] == "the loss is nan"


def test_a_trial_that_is_not_promising_is_stopped(plan, monkeypatch):
    class Always:
        def prune(self, study: Any, trial: Any) -> bool:
            return trial.number == 1 and trial.last_step == 1

    monkeypatch.setattr("vpdeploy_train.sweep.study.make_pruner", lambda *_, **__: Always())
    sweep(plan)
    assert states(plan.out) == ["complete", "pruned", "complete"]
    assert [row["epochs"] for row in table(plan.out)] == ["2", "1", "2"]
    assert not (plan.out / "trials" / "0001" / "task.json").exists()


@pytest.mark.parametrize("name", ["median", "asha", "none"])
@pytest.mark.parametrize("epochs", [1, 2, 100])
def test_every_pruner_can_be_made_for_any_length(name, epochs):
    assert make_pruner(name, epochs=epochs) is not None


def test_a_sweep_of_relative_data_goes_on_from_another_directory(plan, colours, tmp_path, monkeypatch):
    monkeypatch.chdir(colours.parent)
    first = replace(plan, settings=plan.settings.changed(data="colours"), trials=1)
    sweep(first)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(colours)
    assert sweep(replace(plan, settings=plan.settings.changed(data="link/"), trials=2)).states == {"complete": 2}
    assert f'data = "{colours}"' in (plan.out / "trials" / "0000" / "args.toml").read_text()
    with pytest.raises(SpecError, match="cannot go on with other settings: was data"):
        sweep(replace(plan, settings=plan.settings.changed(data=str(write_colours(tmp_path / "others"))), trials=3))


def test_a_study_is_not_continued_with_other_settings(plan):
    sweep(replace(plan, trials=1))
    other = replace(plan, settings=replace(plan.settings, epochs=3))
    with pytest.raises(SpecError, match="other settings: was epochs = 2, now epochs = 3; use another --out"):
        sweep(other)
    with pytest.raises(SpecError, match="cannot go on with other settings: space was"):
        sweep(replace(plan, space={"lr": SPACE["lr"]}))
    with pytest.raises(SpecError, match="holds the trials of study 'sweep', not of 'second'; use another --out"):
        sweep(replace(other, study="second"))


def test_what_was_refused_can_be_corrected_in_the_same_folder(plan):
    with pytest.raises(SpecError, match="unknown method"):
        sweep(replace(plan, space={"method": Choices(values=("e2vpt", "e3vpt"))}))
    with pytest.raises(SpecError, match="unknown data"):
        sweep(replace(plan, settings=replace(plan.settings, data="missing")))
    with pytest.raises(SpecError, match="--storage nonsense: cannot be used"):
        sweep(replace(plan, storage="nonsense"))
    assert sweep(replace(plan, trials=1)).states == {"complete": 1}


def test_methods_draw_only_what_they_know(plan):
    space = {"method": Choices(values=("linear", "vpt-deep")), "prompt_tokens": Choices(values=(1, 2))}
    sweep(replace(plan, space=space, trials=4))
    for row in table(plan.out):
        assert (row["prompt_tokens"] == "") == (row["method"] == "linear")


def test_what_pruning_keeps_can_be_varied(plan, monkeypatch):
    monkeypatch.setattr("vpdeploy_train.training.plot_pruning", lambda _, path: path.touch())
    settings = plan.settings.changed(prune=True, prompt_tokens=4, epochs=1, prune_slack=0.5)
    space = {"keep": Interval(low=0.2, high=0.9, log=False, whole=False)}
    result = sweep(replace(plan, settings=settings, space=space, trials=1))
    card = Run.read(result.best_run).card
    assert card.details["pruning"]["candidates"][1]["keep"] == pytest.approx(result.values["keep"], abs=1e-2)


def test_a_study_in_a_database_is_opened_by_its_url(plan, tmp_path):
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    sweep(replace(plan, storage=url, trials=1))
    with opened_study(
        plan.out, url=url, name="sweep", settings=plan.settings, space=plan.space, pruner="none"
    ) as study:
        assert [trial.state for trial in study.trials] == [TrialState.COMPLETE]
    # Another folder stands for another machine: its runs lie there, the study is shared.
    other = sweep(replace(plan, storage=url, out=tmp_path / "other", trials=2))
    assert other.states == {"complete": 2}
    assert (tmp_path / "other" / "best.toml").is_file()


def test_a_trial_that_ends_while_another_process_looks_for_lost_ones_stays_complete(plan, monkeypatch):
    with opened_study(
        plan.out, url=None, name="sweep", settings=plan.settings, space=plan.space, pruner="none"
    ) as study:
        trial = study.ask()
        listed = study.get_trials

        def list_and_end(*, deepcopy: bool, states: Any = None) -> Any:
            found = listed(deepcopy=deepcopy, states=states)
            if states is not None:
                study.tell(trial, 0.5)
            return found

        monkeypatch.setattr(study, "get_trials", list_and_end)
        reclaim(study, plan.out, is_local=True)
        assert [each.state for each in listed()] == [TrialState.COMPLETE]


def test_a_missing_optuna_is_named_with_its_extra():
    error = exits.missing_extra(ModuleNotFoundError(name="optuna"))
    assert error is not None
    assert exits.exit_code(error) == exits.MISSING_EXTRA
    assert "vpdeploy[sweep]" in str(error)


def test_epochs_are_watched_once_they_are_stored(plan, tmp_path):
    seen: list[EpochRow] = []
    settings = plan.settings.changed(prompt_tokens=1)
    train_run(settings, tmp_path / "run", make_progress=quiet, watch=seen.append)
    assert [(row.phase, row.epoch) for row in seen] == [("train", 1), ("train", 2)]
    again: list[EpochRow] = []
    train_run(settings, tmp_path / "run", make_progress=quiet, resume=True, watch=again.append)
    assert again == seen


def test_the_command_line_prints_where_the_sweep_stands(plan):
    (plan.out.parent / "c.toml").write_text(plan.settings.to_toml(), encoding="utf-8")
    arguments = ["sweep", "--config", str(plan.out.parent / "c.toml"), "--out", str(plan.out), "--trials", "1"]
    arguments += ["--lr", "0.01:1", "--pruner", "none"]
    result = CliRunner().invoke(build_app(arguments), [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    fields = json.loads(result.stdout)
    assert fields["trials"] == {"complete": 1}
    assert 0.01 <= fields["values"]["lr"] <= 1
    assert Path(fields["run"], "task.json").is_file()
    text = CliRunner().invoke(build_app(arguments), arguments).stdout
    assert f"best: trial 0, validation accuracy {fields['best']['val_accuracy']:.4f}" in text


def test_every_trial_finds_its_own_rate_where_that_is_asked_for(plan):
    (plan.out.parent / "c.toml").write_text(plan.settings.to_toml(), encoding="utf-8")
    arguments = ["sweep", "--config", str(plan.out.parent / "c.toml"), "--out", str(plan.out), "--trials", "2"]
    arguments += ["--lr", "auto", "--prompt-tokens", "1,3", "--pruner", "none"]
    result = CliRunner().invoke(build_app(arguments), [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    assert "lr" not in json.loads(result.stdout)["values"]
    assert result.stderr.count("--lr auto: ") == 2


@pytest.mark.parametrize("text", ["auto,0.1", "auto:1"])
def test_auto_is_no_part_of_a_range_or_a_list(text):
    arguments = ["sweep", "--data", "digits", "--out", "nowhere", "--lr", text]
    with pytest.raises(SpecError, match="--lr: 'auto' is not a number; expected a value, LOW:HIGH or A,B,C"):
        CliRunner().invoke(build_app(arguments), arguments, catch_exceptions=False)
    assert not Path("nowhere").exists()


def test_a_best_trial_that_is_no_better_than_its_start_is_told(plan, monkeypatch):
    (plan.out.parent / "c.toml").write_text(plan.settings.to_toml(), encoding="utf-8")
    monkeypatch.setattr("vpdeploy_train.verdict.advise", lambda result: f"nothing at {result.run.card.name}")
    arguments = ["sweep", "--config", str(plan.out.parent / "c.toml"), "--out", str(plan.out), "--trials", "1"]
    result = CliRunner().invoke(build_app(arguments), [*arguments, "--lr", "0.01:1"])
    assert "warning: of the best trial, nothing at sweep" in result.stderr
