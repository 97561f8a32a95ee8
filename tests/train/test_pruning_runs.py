"""Pruning end to end: adaptive prompts, zero tokens, and a search by halving that can be interrupted."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image
from train.test_training import Interrupt, Quiet, interrupting, quiet, results
from train.toys import TOY

from vpdeploy.errors import SpecError
from vpdeploy_train.evaluation import evaluate_run
from vpdeploy_train.methods import METHODS
from vpdeploy_train.methods.method import PromptDimensions
from vpdeploy_train.run import Run
from vpdeploy_train.settings import TrainSettings
from vpdeploy_train.training import train_run

EPOCHS = 4


@pytest.fixture(autouse=True)
def _without_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "pictures" not in request.fixturenames:
        for name in ("plot_curves", "plot_pruning"):
            monkeypatch.setattr(f"vpdeploy_train.training.{name}", lambda _, path: path.touch())


@pytest.fixture
def pictures() -> None:
    """Let a test's runs draw their plots."""


def settings_of(colours: Path, weights: Path, **values: Any) -> TrainSettings:
    return TrainSettings.of(
        **{
            "data": str(colours),
            "backbone": TOY,
            "weights": str(weights),
            "prompt_tokens": 4,
            "kv_tokens": 4,
            "epochs": EPOCHS,
            "batch_size": 8,
            "device": "cpu",
            "prune_candidates": 4,
            **values,
        }
    )


@pytest.fixture
def settings(colours: Path, toy_weights: Path) -> TrainSettings:
    return settings_of(colours, toy_weights)


def train(settings: TrainSettings, out: Path, **options: Any) -> Run:
    return train_run(settings, out, name="toy", make_progress=options.pop("make_progress", quiet), **options).run


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory, colours: Path, toy_weights: Path) -> Path:
    """An uninterrupted search by halving; no test changes it."""
    out = tmp_path_factory.mktemp("runs") / "halved"
    train(settings_of(colours, toy_weights), out)
    return out


def test_halving_stops_the_worse_candidates_at_a_quarter_and_a_half(halved):
    report = json.loads((halved / "pruning.json").read_text(encoding="utf-8"))
    assert [row["keep"] for row in report["candidates"]] == [1.0, 0.5, 0.25, 0.75, 0.1]
    searched = report["candidates"][1:]
    assert sorted(row["epochs"] for row in searched) == [1, 1, 2, 4]
    assert [row["finished"] for row in searched] == [row["epochs"] == 4 for row in searched]
    with (halved / "history.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len([row for row in rows if row["epoch"] != "0"]) == EPOCHS + 1 + 1 + 2 + 4
    finished = next(row for row in searched if row["finished"])
    assert report["chosen"] in ("train", finished["phase"])


def test_a_finalist_is_trained_as_it_would_be_alone(halved, settings, tmp_path):
    report = json.loads((halved / "pruning.json").read_text(encoding="utf-8"))
    finalist = next(row for row in report["candidates"][1:] if row["finished"])
    train(replace(settings, prune_search="full"), tmp_path / "full")
    full = json.loads((tmp_path / "full" / "pruning.json").read_text(encoding="utf-8"))
    assert finalist == next(row for row in full["candidates"] if row["phase"] == finalist["phase"])
    for name in (f"{finalist['phase']}.safetensors",):
        mine = safetensors.torch.load_file(halved / "state" / name)
        alone = safetensors.torch.load_file(tmp_path / "full" / "state" / name)
        assert mine.keys() == alone.keys()
        assert all(torch.equal(value, alone[key]) for key, value in mine.items())


MOMENTS = [("prune-1", "start", 0), ("prune-2", "epoch", 1), ("prune-4", "batch", 1, 2)]


@pytest.mark.parametrize("moment", MOMENTS, ids=["-".join(map(str, moment)) for moment in MOMENTS])
def test_an_interrupted_halving_ends_with_the_bytes_of_an_uninterrupted_one(halved, settings, tmp_path, moment):
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "run", make_progress=interrupting(*moment))
    train(settings, tmp_path / "run", resume=True)
    assert results(tmp_path / "run") == results(halved)


def test_a_halving_interrupted_at_its_later_rungs_ends_with_the_same_bytes(halved, settings, tmp_path):
    begun: list[str] = []

    def stop_at(count: int) -> Any:
        def make(phase: str, images: int, done: int) -> Quiet:
            begun.append(phase)
            return Interrupt("epoch", 2) if len(begun) == count else Quiet()

        return make

    # Phases begin once at each rung: train, the four, two of them, one of them; a resume begins none that is done.
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "run", make_progress=stop_at(6))
    begun.clear()
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "run", resume=True, make_progress=lambda *_: Interrupt("epoch", 3))
    train(settings, tmp_path / "run", resume=True)
    assert results(tmp_path / "run") == results(halved)


@pytest.mark.usefixtures("pictures")
def test_adaptive_prompts_are_pruned_and_rewound_to_their_initial_values(settings, tmp_path):
    # Any accuracy will do, so the smallest set is chosen; at this rate not one float32 value moves.
    values = {"method": "vapt", "vapt_hidden": 4, "keep": "0.5", "prune_candidates": None, "keep_hidden": 0.5}
    frozen = settings.changed(**values, prune=True, prune_slack=0.99, lr=1e-30, epochs=1)
    run = train(frozen, tmp_path / "run")
    kept = run.structure["kept"]
    assert [len(block) for block in kept["tokens"]] == [2, 2]
    assert len(kept["hidden"]) == 2
    options = METHODS["vapt"].Options(prompt_tokens=4, vapt_hidden=4)
    dimensions = PromptDimensions.of(run.load_backbone().trunk)
    generator = torch.Generator().manual_seed(frozen.seed)
    initial = METHODS["vapt"].create(dimensions, options, generator).state_dict()
    assert torch.equal(run.state["method.first"], initial["first"][kept["tokens"][0]])
    assert torch.equal(run.state["method.kernels.0"], initial["kernels.0"])
    assert torch.equal(run.state["method.down"], initial["down"][kept["hidden"]])
    assert torch.equal(run.state["method.up"], initial["up"][:, kept["hidden"]])
    assert run.state["method.linear_weight.0"].shape == (2, initial["linear_weight.0"].shape[1])
    report = run.card.details["pruning"]
    assert report["after"]["parameters"] < report["before"]["parameters"]
    assert report["after"]["bytes"] < report["before"]["bytes"]
    assert report["after"]["macs"] < report["before"]["macs"]
    assert (report["before"]["hidden"], report["after"]["hidden"]) == (4, 2)
    with Image.open(tmp_path / "run" / "pruning.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10


def test_a_pruned_adaptive_run_is_read_back_as_it_was_trained(settings, tmp_path):
    pruning = {"prune": True, "prune_candidates": 2, "keep_hidden": 0.5, "prune_slack": 0.99}
    run = train(settings.changed(method="vapt", vapt_hidden=4, epochs=2, **pruning), tmp_path / "run")
    result = evaluate_run(Run.read(tmp_path / "run"), split="val").evaluation
    assert run.card.details["pruning"]["chosen"] != "train"
    assert result.accuracy == pytest.approx(run.card.details["metrics"]["val_accuracy"])
    assert result.loss == pytest.approx(run.card.details["metrics"]["val_loss"], rel=1e-5)


def test_zero_tokens_stay_in_the_tensors_and_key_value_prompts_are_removed(settings, tmp_path):
    pruning = {"prune_mode": "zero", "keep": "0.5", "prune_candidates": None, "prune_slack": 0.99}
    run = train(replace(settings, **pruning, epochs=1), tmp_path / "run")
    prompts, kept = run.card.details["prompts"], run.structure["kept"]
    assert (prompts["tokens_per_block"], prompts["live_tokens_per_block"]) == ([4, 4], [2, 2])
    assert prompts["kv_tokens_per_block"] == [2, 2]
    assert [sum(row == "0" * 16 for row in block) for block in kept["segments"]] == [2, 2]
    method = run.load_model(run.load_backbone()).method
    for block, rows in enumerate(kept["segments"]):
        zero = [row == "0" * 16 for row in rows]
        assert (method.rows(block)[zero] == 0).all()
        assert (method.rows(block)[[not each for each in zero]] != 0).any()


def test_zeros_are_refused_for_adaptive_prompts_before_anything_is_written(settings, tmp_path):
    zero = settings.changed(method="vapt", vapt_hidden=4, prune=True, prune_mode="zero")
    with pytest.raises(SpecError, match="--prune-mode zero"):
        train(zero, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_tells_how_much_of_the_model_was_tuned(settings, tmp_path):
    run = train(replace(settings, prune=False, epochs=1), tmp_path / "run")
    backbone = sum(parameter.numel() for parameter in run.load_backbone().vit.parameters())
    prompts, head = 2 * (4 + 4) * 32, 3 * 32 + 3
    assert run.card.details["prompts"]["tuned_percent"] == pytest.approx(100 * (prompts + head) / (backbone + head))
    assert run.card.details["prompts"]["bytes"] == 4 * prompts


def test_of_low_rank_updates_the_backbone_is_no_part(settings, tmp_path):
    run = train(settings.changed(method="lora", epochs=1), tmp_path / "run")
    backbone = sum(parameter.numel() for parameter in run.load_backbone().vit.parameters())
    head = 3 * 32 + 3
    updates = run.card.details["prompts"]["parameters"]
    assert run.card.details["prompts"]["tuned_percent"] == pytest.approx(100 * (updates + head) / (backbone + head))
