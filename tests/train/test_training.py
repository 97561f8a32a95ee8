"""Training end to end: repeatable, resumable after any interruption, and true to its settings."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, log_loss
from torch.optim.optimizer import register_optimizer_step_pre_hook
from train.toys import CLASSES, TOY, make_method, make_vit, random_pixels, segment_factors, write_weights
from typer.testing import CliRunner

from vpdeploy.cli.main import build_app
from vpdeploy.errors import BundleError, SpecError, TrainingError
from vpdeploy_train.batches import Batches
from vpdeploy_train.data import ImageDataset, resolve_data
from vpdeploy_train.device import choose_device, make_fabric
from vpdeploy_train.evaluation import Evaluation, evaluate, evaluate_run
from vpdeploy_train.methods import METHODS
from vpdeploy_train.methods.method import PromptDimensions
from vpdeploy_train.pace import Pace
from vpdeploy_train.place import task_name_for
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.run import Run
from vpdeploy_train.settings import TrainSettings
from vpdeploy_train.state import EpochRow, PhaseState, StateFolder
from vpdeploy_train.training import train_run

EPOCHS = 3
TRAIN_IMAGES = 27
"""42 images less a fifth for test and then a fifth for validation, class by class: 14 - 3 - 2."""
BATCH = 8
STEPS = math.ceil(TRAIN_IMAGES / BATCH)


class Quiet:
    """A progress display that tells nothing; tests override what they need."""

    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def on_batch(self, images: int, *, loss: float, accuracy: float) -> None:
        pass

    def on_epoch(self, row: EpochRow) -> None:
        pass


def quiet(phase: str, images: int, done: int) -> Quiet:
    return Quiet()


@pytest.fixture
def pictures() -> None:
    """Let a test's runs draw their plots, which takes longer than the training."""


@pytest.fixture(autouse=True)
def _without_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "pictures" not in request.fixturenames:
        for name in ("plot_curves", "plot_pruning"):
            monkeypatch.setattr(f"vpdeploy_train.training.{name}", lambda _, path: path.touch())


@pytest.fixture
def settings(colours: Path, toy_weights: Path) -> TrainSettings:
    return base_settings(colours, toy_weights)


def base_settings(colours: Path, weights: Path) -> TrainSettings:
    return TrainSettings.of(
        data=str(colours),
        backbone=TOY,
        weights=str(weights),
        prompt_tokens=4,
        kv_tokens=2,
        epochs=EPOCHS,
        batch_size=BATCH,
        device="cpu",
        keep="0.5,0.25",
        prune_search="full",
    )


def train(settings: TrainSettings, out: Path, **options: Any) -> Run:
    return train_run(settings, out, name="toy", make_progress=options.pop("make_progress", quiet), **options).run


def results(out: Path) -> dict[str, Any]:
    """Return everything that equal runs have in common."""
    with (out / "history.csv").open(encoding="utf-8", newline="") as stream:
        history = [
            {name: value for name, value in row.items() if name != "images_per_second"}
            for row in csv.DictReader(stream)
        ]
    files = ["prompts.safetensors", "task.json", "args.toml"]
    files += [name for name in ("pruning.json",) if (out / name).exists()]
    return {"history": history, **{name: (out / name).read_bytes() for name in files}}


def trained(out: Path, column: str) -> list[float]:
    """Return a column of the history over the epochs of all phases, without their starts."""
    return [float(row[column]) for row in results(out)["history"] if row["epoch"] != "0"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, colours: Path, toy_weights: Path) -> Path:
    """An uninterrupted run of the settings above; no test changes it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    train(base_settings(colours, toy_weights), out)
    return out


def stored(out: Path, phase: str) -> dict[str, Any]:
    with safetensors.safe_open(out / "state" / f"{phase}.safetensors", framework="pt") as opened:
        return json.loads(opened.metadata()["state"])


@pytest.mark.usefixtures("pictures")
def test_equal_seeds_give_equal_bytes_and_others_do_not(finished, settings, tmp_path):
    train(settings, tmp_path / "again")
    assert results(tmp_path / "again") == results(finished)
    for name in ("curves.png", "pruning.png"):
        assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes()
    train(replace(settings, seed=1), tmp_path / "other")
    other = (tmp_path / "other" / "prompts.safetensors").read_bytes()
    assert other != (finished / "prompts.safetensors").read_bytes()


def test_the_callers_random_state_does_not_matter(finished, settings, tmp_path):
    torch.manual_seed(12345)
    torch.rand(7)
    train(settings, tmp_path / "again")
    assert results(tmp_path / "again") == results(finished)


def test_the_history_has_every_epoch_of_every_phase(finished):
    rows = results(finished)["history"]
    assert [(row["phase"], row["epoch"]) for row in rows] == [
        (phase, str(epoch)) for phase in ("train", "prune-1", "prune-2") for epoch in range(EPOCHS + 1)
    ]
    for row in rows:
        assert 0 <= float(row["val_accuracy"]) <= 1
        if row["epoch"] == "0":
            assert {row[name] for name in ("lr", "train_loss", "train_accuracy")} == {"nan"}
        else:
            assert 0 < float(row["train_loss"]) < math.inf


def test_prompts_learn_to_tell_colours_apart(settings, tmp_path):
    run = train(replace(settings, epochs=12, lr=0.1, prune=False), tmp_path / "run")
    assert run.card.details["metrics"]["val_accuracy"] == 1.0
    losses = trained(tmp_path / "run", "train_loss")
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("method", ["vfpt", "da-vpt"])
def test_methods_of_one_file_learn_are_pruned_and_read_back(settings, tmp_path, method):
    asked = settings.changed(method=method, epochs=8, lr=0.1, head="zero", prune=True, keep="0.5", prune_slack=0.99)
    run = train(asked, tmp_path / "run")
    losses = trained(tmp_path / "run", "train_loss")[:8]
    assert losses[-1] < 0.8 * losses[0]
    assert run.card.details["pruning"]["chosen"] == "prune-1"
    assert [len(block) for block in run.structure["kept"]["tokens"]] == [2, 2]
    again = Run.read(tmp_path / "run")
    state = again.load_model(again.load_backbone()).trained_state()
    assert state.keys() == run.state.keys()
    assert all(torch.equal(value, run.state[name]) for name, value in state.items())


class Interrupt(Quiet):
    """Raises KeyboardInterrupt at one moment of one phase."""

    def __init__(self, moment: str, epoch: int, batch: int = 0) -> None:
        self.moment, self.epoch, self.batch = moment, epoch, batch
        self.epochs_done, self.batches_done = 0, 0

    def __enter__(self) -> Interrupt:
        if self.moment == "start":
            raise KeyboardInterrupt
        return self

    def on_batch(self, images: int, *, loss: float, accuracy: float) -> None:
        self.batches_done += 1
        position = divmod(self.batches_done - 1, STEPS)
        if self.moment == "batch" and position == (self.epoch - 1, self.batch - 1):
            raise KeyboardInterrupt

    def on_epoch(self, row: EpochRow) -> None:
        if self.moment == "epoch" and row.epoch == self.epoch:
            raise KeyboardInterrupt


def interrupting(phase: str, *moment: Any) -> Callable[[str, int, int], Quiet]:
    return lambda name, images, done: Interrupt(*moment) if name == phase else Quiet()


MOMENTS = [
    ("train", "start", 0),
    ("train", "epoch", 0),
    ("train", "batch", 1, 1),
    ("train", "batch", 2, 3),
    ("train", "epoch", 1),
    ("train", "epoch", EPOCHS),
    ("prune-1", "start", 0),
    ("prune-1", "epoch", 0),
    ("prune-1", "batch", 1, 2),
    ("prune-2", "start", 0),
    ("prune-2", "batch", 2, 1),
    ("prune-2", "epoch", 2),
    ("prune-2", "epoch", EPOCHS),
]


@pytest.mark.parametrize("moment", MOMENTS, ids=["-".join(map(str, moment)) for moment in MOMENTS])
def test_an_interrupted_run_ends_with_the_bytes_of_an_uninterrupted_one(finished, settings, tmp_path, moment):
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "run", make_progress=interrupting(*moment))
    assert not (tmp_path / "run" / "task.json").exists()
    with pytest.raises(BundleError, match=r"not a finished run.*--resume|not a finished run"):
        Run.read(tmp_path / "run")
    train(settings, tmp_path / "run", resume=True)
    assert results(tmp_path / "run") == results(finished)


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": "adamw"},
        {"precision": "bf16"},
        {"rewind": "fresh", "prune_scope": "shared", "kv_shared": False, "segment_order": "strided"},
        {"augment": "rand-augment", "grad_clip": 0.5, "early_stop": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_run_interrupted_again_and_again_ends_with_the_same_bytes(settings, tmp_path, change):
    settings = settings.changed(**change, keep="0.5")
    train(settings, tmp_path / "whole")
    resume = False
    for moment in (("train", "epoch", 1), ("train", "batch", 1, 2), ("prune-1", "epoch", 1), ("prune-1", "start", 0)):
        with pytest.raises(KeyboardInterrupt):
            train(settings, tmp_path / "run", resume=resume, make_progress=interrupting(*moment))
        resume = True
    train(settings, tmp_path / "run", resume=True)
    assert results(tmp_path / "run") == results(tmp_path / "whole")


def test_resuming_a_finished_run_leaves_its_results_as_they_were(settings, tmp_path):
    settings = replace(settings, prune=False)
    train(settings, tmp_path / "run")
    before = results(tmp_path / "run")

    def refuse(phase: str, images: int, done: int) -> Quiet:
        raise AssertionError(f"{phase} was trained again")

    train(settings, tmp_path / "run", resume=True, make_progress=refuse)
    assert results(tmp_path / "run") == before


def test_a_resume_may_take_another_number_of_threads(settings, tmp_path, monkeypatch):
    numbers = []
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    (tmp_path / "config.toml").write_text(replace(settings, prune=False, epochs=1).to_toml(), encoding="utf-8")
    command = ["train", "--config", str(tmp_path / "config.toml"), "--out", str(tmp_path / "run")]
    for threads, further in (("1", []), ("2", ["--resume"])):
        result = CliRunner().invoke(build_app(), [*command, "--threads", threads, *further], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert numbers == [1, 2]
    assert "threads" not in (tmp_path / "run" / "args.toml").read_text(encoding="utf-8")


def test_a_resumed_phase_tells_how_much_is_done(settings, tmp_path):
    settings = replace(settings, prune=False)
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "run", make_progress=interrupting("train", "epoch", 2))
    told: list[tuple[str, int, int]] = []

    def note(*news: Any) -> Quiet:
        told.append(news)
        return Quiet()

    train(settings, tmp_path / "run", resume=True, make_progress=note)
    assert told == [("train", TRAIN_IMAGES * EPOCHS, TRAIN_IMAGES * 2)]


def test_a_killed_process_is_resumed_to_the_bytes_of_an_uninterrupted_run(colours, tmp_path):
    weights = write_weights(tmp_path / "w.safetensors", "test_vit", img_size=32)
    settings = TrainSettings.of(
        data=str(colours),
        backbone="test_vit",
        weights=str(weights),
        image_size=32,
        prompt_tokens=2,
        kv_tokens=1,
        epochs=12,
        batch_size=BATCH,
        device="cpu",
        prune=False,
    )
    train(settings, tmp_path / "whole")
    (tmp_path / "config.toml").write_text(settings.to_toml(), encoding="utf-8")
    out = tmp_path / "killed"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "vpdeploy", "train", "--config", str(tmp_path / "config.toml")]
    with (tmp_path / "log").open("wb") as log:
        child = subprocess.Popen([*command, "--out", str(out)], stdout=log, stderr=log, env=environment)
        try:
            for _ in range(20_000):  # 200 seconds at most
                if (out / "state" / "train.safetensors").exists() and stored(out, "train")["history"]:
                    break
                try:
                    child.wait(timeout=0.01)
                    break
                except subprocess.TimeoutExpired:
                    continue
        finally:
            child.kill()
            child.wait()
    assert child.returncode == -signal.SIGKILL, (tmp_path / "log").read_text(encoding="utf-8")
    done = stored(out, "train")
    assert 1 <= len(done["history"]) < settings.epochs
    assert not done["finished"]
    train(settings, out, resume=True)
    assert results(out) == results(tmp_path / "whole")


@pytest.mark.parametrize(("change", "option"), [({"lr": 1.0}, "--lr"), ({"seed": 4}, "--seed"), ({"keep": "1"}, "--")])
def test_resuming_with_other_settings_is_refused(finished, settings, change, option):
    before = results(finished)
    with pytest.raises(SpecError, match=f"cannot resume with other settings: {option}"):
        train(settings.changed(**change), finished, resume=True)
    assert results(finished) == before


@pytest.mark.parametrize("exists", [True, False])
def test_resuming_nothing_is_refused(settings, tmp_path, exists):
    out = tmp_path / "run"
    if exists:
        out.mkdir()
    with pytest.raises(SpecError, match=r"nothing to resume, args\.toml is missing; start without --resume"):
        train(settings, out, resume=True)
    assert out.exists() == exists


def test_an_existing_folder_is_refused_and_untouched(finished, settings, tmp_path):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(SpecError, match="exists and is not empty; continue it with --resume"):
        train(settings, finished)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(SpecError, match="exists and is not empty"):
        train(settings, tmp_path / "file")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_an_empty_folder_is_taken(settings, tmp_path):
    (tmp_path / "run").mkdir()
    train(replace(settings, prune=False, epochs=1), tmp_path / "run")
    assert (tmp_path / "run" / "task.json").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "prompt"}, "unknown method 'prompt'"),
        ({"method": "linear", "prune": True}, "--prune: method 'linear' has no prompts"),
        ({"backbone": "no_such_vit"}, "unknown backbone"),
        ({"augment": "blur"}, "--augment 'blur': choose one of none"),
        ({"weights": "missing.safetensors"}, "weights file not found"),
        ({"data": "missing"}, "unknown data"),
        ({"device": "tpu"}, "--device 'tpu'"),
    ],
)
def test_what_does_not_fit_is_refused_and_can_be_corrected_in_the_same_folder(settings, tmp_path, change, message):
    with pytest.raises(SpecError, match=message):
        train(settings.changed(**change), tmp_path / "run")
    train(replace(settings, prune=False, epochs=1), tmp_path / "run")


def test_a_damaged_state_is_refused_by_name(settings, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "run", make_progress=interrupting("train", "epoch", 1))
    path = tmp_path / "run" / "state" / "train.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(TrainingError, match=r"train\.safetensors: cannot be resumed from"):
        train(settings, tmp_path / "run", resume=True)


def one_epoch(**changes: Any) -> PhaseState:
    row = EpochRow(
        phase="train",
        epoch=1,
        lr=0.1,
        train_loss=1.0,
        train_accuracy=0.5,
        val_loss=1.0,
        val_accuracy=0.5,
        images_per_second=1.0,
    )
    pace = Pace(lr=0.1, head_scale=1.0, weight_decay=0.0, warmup_steps=0)
    fields = {"pace": pace, "history": [row], "best_epoch": 1, "best": {"head.bias": torch.zeros(2)}}
    return PhaseState(**{**fields, **changes})


@pytest.mark.parametrize(
    "changes", [{"best_epoch": 0}, {"best_epoch": 2}, {"best_epoch": -1}, {"history": [], "best_epoch": 0}]
)
def test_a_state_whose_best_epoch_is_none_of_its_own_is_refused(tmp_path, changes):
    folder = StateFolder(tmp_path)
    folder.write("train", one_epoch(finished=True))
    assert folder.read("train").best_row.epoch == 1
    folder.write("train", one_epoch(finished=True, **changes))
    with pytest.raises(TrainingError, match=r"train\.safetensors: cannot be resumed from"):
        folder.read("train")


@pytest.mark.parametrize("finished", [True, False])
def test_a_state_of_another_model_is_refused_by_its_phase(settings, tmp_path, finished):
    settings = replace(settings, prune=False, head="zero")
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "run", make_progress=interrupting("train", "epoch", 1))
    foreign = {"head.bias": torch.zeros(2)}
    StateFolder(tmp_path / "run" / "state").write("train", one_epoch(finished=finished, current=foreign))
    with pytest.raises(TrainingError, match=r"the stored state of phase 'train' does not fit.*; delete the run"):
        train(settings, tmp_path / "run", resume=True)


@pytest.mark.parametrize("failing", ["flush", "write"])
def test_a_full_disk_leaves_the_previous_epochs_state(finished, settings, tmp_path, failing):
    out = tmp_path / "run"
    before: list[bytes] = []

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    class FillDisk(Quiet):
        def on_epoch(self, row: EpochRow) -> None:
            if row.epoch == 2:
                before.append((out / "state" / "train.safetensors").read_bytes())
                patch.setattr(*((os, "fsync") if failing == "flush" else (Path, "write_bytes")), fail)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space left"):
        train(settings, out, make_progress=lambda *_: FillDisk())
    assert {path.name for path in (out / "state").iterdir()} == {"name.txt", "train.safetensors"}
    assert (out / "state" / "train.safetensors").read_bytes() == before[0]
    assert len(stored(out, "train")["history"]) == 2
    train(settings, out, resume=True)
    assert results(out) == results(finished)


def test_a_loss_that_is_not_finite_stops_with_its_place(settings, tmp_path):
    with pytest.raises(TrainingError) as caught:
        train(replace(settings, lr=1e30), tmp_path / "run")
    assert "the loss is nan at step" in str(caught.value) or "the loss is inf at step" in str(caught.value)
    assert f"of {STEPS})" in str(caught.value)
    assert not (tmp_path / "run" / "task.json").exists()


def test_weights_that_are_not_finite_stop_before_the_first_step(settings, toy_weights, tmp_path):
    state = safetensors.torch.load_file(toy_weights)
    state["norm.bias"][3] = float("nan")
    safetensors.torch.save_file(state, tmp_path / "nan.safetensors")
    message = "the loss is nan on the validation images before the first step; check the backbone's weights"
    with pytest.raises(TrainingError, match=message):
        train(replace(settings, weights=str(tmp_path / "nan.safetensors"), head="zero"), tmp_path / "run")
    with pytest.raises(TrainingError, match="the backbone gives features that are not finite; check its weights"):
        train(replace(settings, weights=str(tmp_path / "nan.safetensors"), head="probe"), tmp_path / "run2")


def test_a_later_loss_that_is_not_finite_names_its_epoch_and_batch(settings, tmp_path, monkeypatch):
    original, calls = F.cross_entropy, []

    def spoil(*arguments: Any, **options: Any) -> torch.Tensor:
        loss = original(*arguments, **options)
        if options.get("reduction") == "sum":
            return loss
        calls.append(loss)
        return loss * math.inf if len(calls) == STEPS + 3 else loss

    monkeypatch.setattr(F, "cross_entropy", spoil)
    message = rf"the loss is inf at step {STEPS + 3} \(epoch 2, batch 3 of {STEPS}\)"
    with pytest.raises(TrainingError, match=message):
        train(settings, tmp_path / "run")


def test_a_loss_that_is_not_finite_on_validation_names_its_epoch(settings, tmp_path, monkeypatch):
    original = F.cross_entropy

    def spoil(*arguments: Any, **options: Any) -> torch.Tensor:
        loss = original(*arguments, **options)
        calls.append(options.get("reduction"))
        return loss * math.nan if calls[-1] == "sum" and calls.count(None) + calls.count("mean") else loss

    calls: list[str | None] = []
    monkeypatch.setattr(F, "cross_entropy", spoil)
    with pytest.raises(TrainingError, match="the loss is nan on the validation images after epoch 1; lower --lr"):
        train(replace(settings, epochs=1, prune=False), tmp_path / "run")


def test_everything_is_always_a_candidate_beside_the_shares(finished):
    report = Run.read(finished).card.details["pruning"]
    shares = [(row["phase"], row["keep"], row["keep_segments"]) for row in report["candidates"]]
    assert shares == [("train", 1.0, 1.0), ("prune-1", 0.5, 0.75), ("prune-2", 0.25, 0.75)]
    assert report["chosen"] in ("train", "prune-1", "prune-2")
    assert [len(row) for row in report["token_scores"]] == [4, 4]
    assert json.loads((finished / "pruning.json").read_text(encoding="utf-8")) == report


def test_pruning_removes_tokens_and_rewinds_to_the_initial_values(settings, colours, tmp_path):
    # Any accuracy will do, so the smallest set is chosen; at this rate not one float32 value moves.
    frozen = settings.changed(prune_slack=0.99, lr=1e-30, epochs=1, kv_tokens=4)
    run = train(frozen, tmp_path / "run")
    report = run.card.details["pruning"]
    assert report["chosen"] == "prune-2"
    kept = run.structure["kept"]
    assert [len(block) for block in kept["tokens"]] == [len(block) for block in kept["kv_tokens"]] == [1, 1]
    assert all(row.count("1") == 12 for block in kept["segments"] for row in block)
    options = METHODS["e2vpt"].Options(prompt_tokens=4, kv_tokens=4)
    generator = torch.Generator().manual_seed(frozen.seed)
    initial = METHODS["e2vpt"].create(PromptDimensions.of(run.load_backbone().trunk), options, generator).state_dict()
    for block in range(2):
        assert torch.equal(run.state[f"method.visual.{block}"], initial[f"visual.{block}"][kept["tokens"][block]])
        rows = kept["kv_tokens"][block]
        assert torch.equal(run.state[f"method.kv.{block}"], initial[f"kv.{block}"][:, rows])
        scores = report["token_scores"][block]
        assert kept["tokens"][block] == [scores.index(max(scores))]
    segments = [[[flag == "1" for flag in row] for row in block] for block in kept["segments"]]
    model = run.load_model(run.load_backbone())
    for block, rows in enumerate(segments):
        zeroed = segment_factors(rows, 32, "contiguous") == 0
        assert (model.method.rows(block)[zeroed] == 0).all()


def test_the_rewind_starts_from_the_initial_values_not_the_trained_ones(settings, tmp_path):
    settings = replace(settings, keep="0.5", prune_slack=0.99)
    starts: list[list[torch.Tensor]] = []

    def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
        starts.append([value.detach().clone() for group in optimizer.param_groups for value in group["params"]])

    handle = register_optimizer_step_pre_hook(note)
    try:
        run = train(settings, tmp_path / "run")
    finally:
        handle.remove()
    initial, trained, rewound = starts[0], starts[EPOCHS * STEPS - 1], starts[EPOCHS * STEPS]
    assert not torch.equal(initial[0], trained[0])
    kept = run.structure["kept"]
    for block in range(2):
        assert torch.equal(rewound[block], initial[block][kept["tokens"][block]])
        assert torch.equal(rewound[2 + block], initial[2 + block][:, kept["kv_tokens"][block]])
    assert torch.equal(rewound[4], initial[4])
    assert torch.equal(rewound[5], initial[5])


def test_the_epoch_that_is_best_on_validation_is_the_result(settings, tmp_path, monkeypatch):
    right_of_four = iter([0, 1, 3, 2])

    def rate(*_: object) -> Evaluation:
        predicted = np.arange(4) >= next(right_of_four)
        return Evaluation(loss=1.0, classes=2, labels=np.zeros(4, int), predicted=predicted.astype(int))

    monkeypatch.setattr("vpdeploy_train.loop.evaluate", rate)
    after: list[dict[str, torch.Tensor]] = []

    class Note(Quiet):
        def on_epoch(self, row: EpochRow) -> None:
            assert len(after) == row.epoch
            after.append(StateFolder(tmp_path / "run" / "state").read("train").current)

    run = train(replace(settings, prune=False), tmp_path / "run", make_progress=lambda *_: Note())
    assert run.card.details["metrics"]["val_accuracy"] == 0.75
    for name, value in run.state.items():
        assert torch.equal(value, after[2][name])
        assert not torch.equal(value, after[3][name])


def test_images_are_varied_anew_in_every_epoch(settings, tmp_path):
    # Nothing is learned at this rate, so only the images can make the losses differ.
    settings = settings.changed(lr=1e-30, prompt_dropout=0.0, prune=False)
    losses = {}
    for augment in ("none", "crop-flip"):
        train(replace(settings, augment=augment), tmp_path / augment)
        losses[augment] = trained(tmp_path / augment, "train_loss")
    assert losses["none"] == pytest.approx([losses["none"][0]] * EPOCHS, rel=1e-6)
    assert max(losses["crop-flip"]) - min(losses["crop-flip"]) > 1e-4


def test_a_fresh_rewind_starts_elsewhere(settings, tmp_path):
    frozen = replace(settings, prune_slack=0.99, lr=1e-30, epochs=1)
    states = {}
    for rewind in ("initial", "fresh"):
        run = train(replace(frozen, rewind=rewind), tmp_path / rewind)
        assert run.card.details["pruning"]["chosen"] == "prune-2"
        states[rewind] = run.state["method.visual.0"]
    assert not torch.equal(states["initial"], states["fresh"])


def test_a_shared_choice_keeps_the_same_tokens_in_every_block(settings, tmp_path):
    run = train(replace(settings, prune_scope="shared", prune_slack=0.99, epochs=1), tmp_path / "run")
    kept = run.structure["kept"]
    assert kept["tokens"][0] == kept["tokens"][1]
    assert kept["kv_tokens"][0] == kept["kv_tokens"][1]
    assert kept["segments"][0] == kept["segments"][1]


@pytest.mark.parametrize("method", ["linear", "vpt-deep", "e2vpt"])
def test_each_method_trains_its_own_tensors(settings, tmp_path, method):
    run = train(settings.changed(method=method, prune=False, epochs=1), tmp_path / "run")
    prompts = {name.split(".")[1]: tuple(value.shape) for name, value in run.state.items() if "method" in name}
    expected = {
        "linear": {},
        "vpt-deep": {"visual": (4, 32), "kv": (2, 0, 16)},
        "e2vpt": {"visual": (4, 32), "kv": (2, 2, 16)},
    }
    assert prompts == expected[method]
    assert run.state["head.weight"].shape == (CLASSES, 32)


@pytest.mark.parametrize("change", [{"prompt_tokens": 0}, {"kv_tokens": 0}, {"prompt_tokens": 0, "kv_tokens": 0}])
def test_a_kind_of_prompt_can_be_left_out(settings, tmp_path, change):
    train(settings.changed(epochs=1, **change), tmp_path / "run")
    accuracy = evaluate_run(Run.read(tmp_path / "run"), split="val").evaluation
    assert accuracy.images == 6


def test_early_stopping_ends_a_phase_that_no_longer_improves(settings, tmp_path):
    # At this rate nothing changes, so the first epoch stays the best of those that were trained.
    train(replace(settings, lr=1e-30, epochs=10, early_stop=2, prune=False), tmp_path / "run")
    assert [row["epoch"] for row in results(tmp_path / "run")["history"]] == ["0", "1", "2", "3"]
    assert stored(tmp_path / "run", "train")["best_epoch"] == 0


@contextmanager
def watched_steps() -> Iterator[list[dict[str, Any]]]:
    """Note, before every optimizer step, its groups and the norm of its gradients."""
    steps: list[dict[str, Any]] = []

    def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients = [value.grad for group in optimizer.param_groups for value in group["params"]]
        steps.append(
            {
                "kind": type(optimizer),
                "norm": float(torch.cat([gradient.flatten() for gradient in gradients]).norm()),
                "groups": [
                    {
                        "lr": group["lr"],
                        "weight_decay": group["weight_decay"],
                        "momentum": group.get("momentum"),
                        "shapes": [tuple(value.shape) for value in group["params"]],
                    }
                    for group in optimizer.param_groups
                ],
            }
        )

    handle = register_optimizer_step_pre_hook(note)
    try:
        yield steps
    finally:
        handle.remove()


@pytest.mark.parametrize(("epochs", "warmup_epochs"), [(4, 1.0), (4, 0.5), (4, 0.0), (10, None)])
def test_the_rate_warms_up_and_falls_as_a_cosine_at_every_step(settings, tmp_path, epochs, warmup_epochs):
    settings = replace(settings, epochs=epochs, warmup_epochs=warmup_epochs, lr=1.6, prune=False, head_lr_scale=0.25)
    with watched_steps() as steps:
        train(settings, tmp_path / "run")
    base, total = 1.6 * BATCH / 256, epochs * STEPS
    warmup = 20 if warmup_epochs is None else round(warmup_epochs * STEPS)  # half of the 40 steps: 20 at least
    rates = [step["groups"][0]["lr"] for step in steps]
    expected = [
        base * step / warmup
        if step < warmup
        else base * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup + 1)))
        for step in range(1, total + 1)
    ]
    assert rates == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert rates[0] > 0
    assert max(rates) <= base
    assert 0 < rates[-1] < base / 50
    if warmup:
        assert rates[0] == pytest.approx(base / warmup)
    for step in steps:
        prompts, head_weight, head_bias = (group["lr"] for group in step["groups"])
        assert head_weight == head_bias == pytest.approx(0.25 * prompts, rel=1e-9)
    assert trained(tmp_path / "run", "lr") == rates[STEPS - 1 :: STEPS]


def test_a_single_step_trains_something(settings, tmp_path):
    run = train(replace(settings, epochs=1, batch_size=64, prune=False), tmp_path / "run")
    assert float(run.state["head.bias"].abs().max()) > 0


@pytest.mark.parametrize(("optimizer", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_every_trained_tensor_but_the_heads_bias_is_decayed(settings, tmp_path, optimizer, kind):
    with watched_steps() as steps:
        train(
            settings.changed(optimizer=optimizer, weight_decay=0.125, epochs=1, prune=False, kv_shared=False),
            tmp_path / "run",
        )
    assert len(steps) == STEPS
    for step in steps:
        assert step["kind"] is kind
        decay = {shape: group["weight_decay"] for group in step["groups"] for shape in group["shapes"]}
        assert decay == {(4, 32): 0.125, (2, 2, 16): 0.125, (CLASSES, 32): 0.125, (CLASSES,): 0.0}
        assert sum(len(group["shapes"]) for group in step["groups"]) == 2 + 2 + 2 + 2
        assert {group["momentum"] for group in step["groups"]} == ({0.9} if optimizer == "sgd" else {None})


def test_gradients_are_clipped_to_the_norm_that_is_asked_for(settings, tmp_path):
    norms = {}
    for clip in (0.0, 0.05):
        with watched_steps() as steps:
            train(replace(settings, grad_clip=clip, epochs=1, prune=False), tmp_path / str(clip))
        norms[clip] = [step["norm"] for step in steps]
    assert min(norms[0.0]) > 0.05
    assert norms[0.05] == pytest.approx([0.05] * STEPS, rel=1e-4)


def test_bfloat16_trains_on_the_cpu_and_differs_from_float32(finished, settings, tmp_path):
    run = train(replace(settings, precision="bf16"), tmp_path / "run")
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in run.state.values())
    assert results(tmp_path / "run")["history"] != results(finished)["history"]


def test_float16_on_the_cpu_is_refused_not_replaced(settings, tmp_path):
    with pytest.raises(SpecError, match="--precision fp16 needs a GPU"):
        train(replace(settings, precision="fp16"), tmp_path / "run")
    with pytest.raises(SpecError, match="--precision fp16 needs a GPU"):
        make_fabric("fp16", torch.device("cpu"))


def test_an_absent_gpu_is_refused_not_replaced(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SpecError, match="--device cuda: torch sees no CUDA device"):
        train(replace(settings, device="cuda"), tmp_path / "run")
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")


def test_determinism_is_asked_for_during_training_alone(settings, tmp_path):
    assert not torch.are_deterministic_algorithms_enabled()
    seen: list[bool] = []

    class Note(Quiet):
        def on_batch(self, images: int, *, loss: float, accuracy: float) -> None:
            seen.append(torch.are_deterministic_algorithms_enabled())

    train(replace(settings, epochs=1, prune=False), tmp_path / "run", make_progress=lambda *_: Note())
    assert seen == [True] * STEPS
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("name", ["curves.png", "pruning.png"])
def test_plots_are_pictures(finished, name):
    with Image.open(finished / name) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 200
        picture.load()
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10


def test_a_run_without_pruning_has_no_pruning_report(settings, tmp_path):
    run = train(replace(settings, epochs=1, prune=False), tmp_path / "run")
    assert run.card.details["pruning"] is None
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "args.toml",
        "curves.png",
        "history.csv",
        "prompts.safetensors",
        "state",
        "task.json",
    }


def test_evaluation_agrees_with_scikit_learn():
    vit = make_vit()
    model = PromptedViT(vit, make_method(vit, 3, 2), CLASSES)
    pixels, labels = random_pixels(60, dtype=torch.float32), torch.arange(60) % CLASSES
    with torch.no_grad():
        model.head.weight *= 50  # spreads the predictions over the classes
        model.eval()
        logits = model(pixels).double()
    predicted = logits.argmax(1)
    assert 0 < accuracy_score(labels, predicted) < 1
    result = evaluate(model.train(), [(pixels[:32], labels[:32]), (pixels[32:], labels[32:])])
    assert result.images == 60
    assert result.accuracy == pytest.approx(accuracy_score(labels, predicted))
    assert result.class_accuracy == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert result.loss == pytest.approx(log_loss(labels, logits.softmax(1).numpy()), rel=1e-4)
    assert result.confusion().tolist() == confusion_matrix(labels, predicted).tolist()
    assert result.to_json()["confusion"] == confusion_matrix(labels, predicted).tolist()
    assert not model.training


def test_accuracy_over_many_classes_takes_no_square_of_memory():
    labels = np.array([0, 0, 7, 7, 999_999])  # a matrix of counts would take 8 TB
    predicted = np.array([0, 3, 7, 7, 5])
    result = Evaluation(loss=0.0, classes=1_000_000, labels=labels, predicted=predicted)
    assert result.accuracy == 3 / 5
    # Classes 0, 7 and 999,999 have images; 3 and 5 are only predicted, which counts as 0.
    assert result.class_accuracy == (1 / 2 + 1 + 0 + 0 + 0) / 5


def test_no_images_are_no_right_ones():
    nothing = np.zeros(0, np.int64)
    result = Evaluation(loss=0.0, classes=2, labels=nothing, predicted=nothing)
    assert (result.images, result.accuracy, result.class_accuracy) == (0, 0.0, 0.0)
    assert result.confusion().tolist() == [[0, 0], [0, 0]]


def test_a_finished_run_evaluates_to_the_validation_accuracy_it_reports(finished):
    run = Run.read(finished)
    found = evaluate_run(Run.read(finished), split="val")
    result, labels = found.evaluation, found.to_json()["labels"]
    assert labels == ["blue", "green", "red"]
    assert result.accuracy == pytest.approx(run.card.details["metrics"]["val_accuracy"])
    assert result.loss == pytest.approx(run.card.details["metrics"]["val_loss"], rel=1e-5)


def test_the_test_split_is_evaluated_on_images_the_training_never_saw(finished, colours):
    run = Run.read(finished)
    source = resolve_data(str(colours), seed=run.data_seed, val_fraction=run.val_fraction, labels=run.card.labels)
    model = run.load_model(run.load_backbone())
    batches = Batches(
        dataset=ImageDataset(source.test, run.card.preprocessing),
        preprocessing=run.card.preprocessing,
        batch_size=2,
        device=torch.device("cpu"),
    )
    with torch.no_grad():
        predicted = torch.cat([model(pixels).argmax(1) for pixels, _ in batches])
    labels = [example.label for example in source.test]
    result = evaluate_run(Run.read(finished), split="test").evaluation
    assert result.images == len(labels) == 9
    assert result.accuracy == pytest.approx(accuracy_score(labels, predicted))
    assert run.card.details["images"] == {"train": TRAIN_IMAGES, "val": 6, "test": 9}


def test_a_run_refuses_other_weights_than_those_it_was_trained_on(finished, tmp_path):
    other = write_weights(tmp_path / "other.safetensors", img_size=32)
    state = safetensors.torch.load_file(other)
    state["norm.bias"] += 1
    safetensors.torch.save_file(state, other)
    with pytest.raises(SpecError, match=r"give the original ones with --weights"):
        Run.read(finished).load_backbone(weights=other)


def test_a_phases_state_survives_the_file(finished):
    state = StateFolder(finished / "state").read("train")
    assert state.finished
    assert [row.epoch for row in state.history] == list(range(1, EPOCHS + 1))
    best = max(state.history, key=lambda row: (row.val_accuracy, -row.val_loss, -row.epoch))
    assert state.best_row == best
    assert StateFolder(finished / "state").read("prune-9").history == []


@pytest.mark.parametrize("name", ["flowers", "a", "1.2_b-C", "a" * 64])
def test_a_tasks_name_is_that_of_the_folder(name, tmp_path):
    assert task_name_for(tmp_path / name) == name


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("my run!", "another with --name, e.g. --name my-run"),
        ("ünï 🌹", "another with --name$"),
        ("--", "another with --name$"),
        ("a" * 65, "another with --name, e.g. --name a{64}$"),
        ("-x", "another with --name, e.g. --name x$"),
        ("a\n", "e.g. --name a$"),
    ],
)
def test_a_folder_whose_name_cannot_name_a_task_asks_for_one(name, advice, tmp_path):
    with pytest.raises(SpecError, match=advice):
        task_name_for(tmp_path / name)


def test_a_name_that_cannot_name_a_task_is_refused_before_anything_is_loaded(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("vpdeploy_train.training.load_inputs", None)
    for name in ("a/b", "../x", "my task", "", "a\n"):
        with pytest.raises(SpecError, match="cannot name a task"):
            train_run(settings, tmp_path / "run", name=name)
    with pytest.raises(SpecError, match="give another with --name"):
        train_run(settings, tmp_path / "my run")
    assert list(tmp_path.iterdir()) == []


def test_a_resume_keeps_the_tasks_name_unless_it_is_given_another(settings, tmp_path):
    settings = replace(settings, epochs=1, prune=False)
    out = tmp_path / "ünï 🌹"
    train_run(settings, out, name="roses", make_progress=quiet)
    assert train_run(settings, out, resume=True).run.card.name == "roses"
    assert train_run(settings, out, resume=True, name="tulips").run.card.name == "tulips"
    assert train_run(settings, out, resume=True).run.card.name == "tulips"
    # A run of an earlier version says nothing of its name.
    (out / "state" / "name.txt").unlink()
    with pytest.raises(SpecError, match="give another with --name"):
        train_run(settings, out, resume=True)
