"""``--lr auto``: the rate is repeatable, sane, kept by everything that follows, and refused where it means nothing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from train.test_start import Note
from train.toys import TOY, write_colours

from vpdeploy.errors import SpecError, TrainingError
from vpdeploy_train.lr_range import STEPS, choose_rate, smoothed
from vpdeploy_train.results import TrainingResult
from vpdeploy_train.settings import TrainSettings
from vpdeploy_train.training import train_run

RATES = [10.0**power for power in range(-5, 3)]


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plot_curves", "plot_pruning"):
        monkeypatch.setattr(f"vpdeploy_train.training.{name}", lambda _, path: path.touch())


@pytest.fixture
def settings(colours: Path, toy_weights: Path) -> TrainSettings:
    return TrainSettings.of(
        data=str(colours),
        backbone=TOY,
        weights=str(toy_weights),
        prompt_tokens=4,
        kv_tokens=2,
        epochs=2,
        batch_size=8,
        device="cpu",
        lr="auto",
        prune=False,
    )


def train(
    settings: TrainSettings, out: Path, *, stop: tuple[str, int] | None = None, resume: bool = False
) -> TrainingResult:
    return train_run(settings, out, name="toy", resume=resume, make_progress=lambda *_: Note([], stop))


def test_a_fifth_of_the_highest_rate_that_is_stood_is_chosen():
    found = choose_rate(RATES, [1.0] * 6 + [50.0, 90.0])
    assert found.lr == pytest.approx(0.2 * RATES[5])
    assert "a fifth of 1, the highest rate that the training stood" in found.reason
    assert "then the loss rose" in found.reason


def test_a_loss_that_ends_as_no_number_was_not_stood():
    assert choose_rate(RATES, [1.0, 1.0, 1.0, math.nan]).lr == pytest.approx(0.2 * RATES[2])


def test_a_loss_that_never_rises_leads_to_the_highest_rate():
    found = choose_rate(RATES, [1.0] * len(RATES))
    assert found.lr == pytest.approx(0.2 * RATES[-1])
    assert "had not risen at the highest rate" in found.reason


@pytest.mark.parametrize("losses", [[], [math.nan], [math.inf, 1.0]])
def test_a_loss_that_is_no_number_at_once_is_refused_in_a_line(losses):
    with pytest.raises(TrainingError, match="--lr auto: the loss is not finite at the lowest rate, 1e-05") as caught:
        choose_rate(RATES, losses)
    assert "\n" not in str(caught.value)


def test_the_running_mean_of_equal_losses_is_that_loss():
    assert smoothed([0.5] * 6) == pytest.approx([0.5] * 6)


def test_the_rate_is_kept_with_its_reason_and_pruning_trains_at_it(settings, tmp_path, caplog):
    caplog.set_level("INFO", "vpdeploy.train")
    result = train(replace(settings, prune=True, keep="0.5"), tmp_path / "run")
    assert result.chosen is not None
    assert result.chosen.lr_reason is not None
    assert f"--lr auto: {result.chosen.lr:.3g}, {result.chosen.lr_reason}" in caplog.messages
    details = json.loads((tmp_path / "run" / "task.json").read_text(encoding="utf-8"))["task"]["details"]
    assert details["hyperparameters"]["lr"] == result.chosen.lr
    assert details["chosen"]["lr_reason"] == result.chosen.lr_reason
    paces = []
    for phase in ("train", "prune-1"):
        with safetensors.safe_open(tmp_path / "run" / "state" / f"{phase}.safetensors", framework="pt") as opened:
            paces.append(json.loads(opened.metadata()["state"])["pace"])
    assert paces[0] == paces[1]
    assert paces[0]["lr"] == result.chosen.lr
    assert 'lr = "auto"' in (tmp_path / "run" / "args.toml").read_text(encoding="utf-8")


def test_the_test_leaves_the_start_as_it_was(settings, tmp_path):
    for name, lr in (("auto", "auto"), ("fixed", 0.01)):
        with pytest.raises(KeyboardInterrupt):
            train(replace(settings, lr=lr), tmp_path / name, stop=("train", 0))
    states = [
        safetensors.torch.load_file(tmp_path / name / "state" / "train.safetensors") for name in ("auto", "fixed")
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_equal_seeds_find_equal_rates_and_the_interrupted_test_is_made_again(settings, tmp_path, monkeypatch):
    whole = train(settings, tmp_path / "whole")
    steps = 0
    real = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == STEPS // 2:
            raise KeyboardInterrupt
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train(settings, tmp_path / "run")
    assert not list((tmp_path / "run" / "state").glob("*.safetensors"))  # no phase has begun
    train(settings, tmp_path / "run", resume=True)
    for name in ("prompts.safetensors", "task.json", "args.toml"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert whole.chosen is not None


def test_a_resume_after_the_test_does_not_make_it_again(settings, tmp_path, monkeypatch):
    train(settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "run", stop=("train", 1))
    monkeypatch.setattr("vpdeploy_train.workbench.find_rate", lambda *_, **__: pytest.fail("tested again"))
    train(settings, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "task.json").read_bytes() == (tmp_path / "whole" / "task.json").read_bytes()


@pytest.mark.parametrize("method", ["vapt", "vpt-deep", "vpt-shallow", "linear", "lora", "full", "vfpt", "da-vpt"])
def test_every_method_has_a_rate_found(settings, tmp_path, method):
    result = train(settings.changed(method=method, epochs=1), tmp_path / "run")
    assert result.chosen is not None
    assert 0 < result.chosen.lr < math.inf


def test_sgd_from_a_zero_head_has_a_rate_found(settings, tmp_path):
    result = train(replace(settings, optimizer="sgd", head="zero", epochs=1), tmp_path / "run")
    assert result.chosen is not None
    assert 0 < result.chosen.lr < math.inf


def test_too_few_images_are_refused_in_a_line(settings, tmp_path):
    few = write_colours(tmp_path / "few")
    for path in few.glob("*/*.png"):
        if int(path.stem) > 4:
            path.unlink()
    with pytest.raises(SpecError, match=r"--lr auto: \d+ training images are too few to try rates on, 16 at least"):
        train(replace(settings, data=str(few)), tmp_path / "run")


def test_the_command_line_takes_a_rate_or_auto_and_nothing_else(settings):
    option = {"data": settings.data, "lr": "auto"}
    assert TrainSettings.merge(option).lr == "auto"
    with pytest.raises(SpecError, match="--lr: expected float or auto, found 'fast'"):
        TrainSettings.merge(option | {"lr": "fast"})
    with pytest.raises(SpecError, match="--lr should be positive or auto, found -1"):
        TrainSettings.merge(option | {"lr": -1.0})
