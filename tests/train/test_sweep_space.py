"""What a sweep varies: options, files, defaults, and what the command line makes of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vpdeploy.cli.main import build_app
from vpdeploy.errors import SpecError
from vpdeploy_train.cli.sweep import _plan
from vpdeploy_train.config import read_toml
from vpdeploy_train.methods import METHODS
from vpdeploy_train.settings import TrainSettings
from vpdeploy_train.sweep.space import (
    Choices,
    Interval,
    check_space,
    default_space,
    read_option,
    read_space,
    with_values,
)


def make(**values: Any) -> TrainSettings:
    return TrainSettings.of(data="digits", **values)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("lr", "0.5", 0.5),
        ("lr", "0.01:3", Interval(low=0.01, high=3.0, log=True, whole=False)),
        ("lr", "0.1,0.5", Choices(values=(0.1, 0.5))),
        ("prompt_tokens", "5", 5),
        ("prompt_tokens", "1:50", Interval(low=1.0, high=50.0, log=False, whole=True)),
        ("prompt_tokens", "5,10,50", Choices(values=(5, 10, 50))),
        ("prompt_dropout", "0:0.5", Interval(low=0.0, high=0.5, log=False, whole=False)),
        ("method", "e2vpt,vapt", Choices(values=("e2vpt", "vapt"))),
        ("keep", "0.5,0.25", "0.5,0.25"),
        ("keep", "0.2:0.8", Interval(low=0.2, high=0.8, log=False, whole=False)),
    ],
)
def test_an_option_is_a_value_a_range_or_a_list(name, text, expected):
    assert read_option(name, text) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("lr", "fast", "--lr: 'fast' is not a number; expected a value, LOW:HIGH or A,B,C"),
        ("lr", "1:2:3", "--lr '1:2:3': expected LOW:HIGH"),
        ("lr", "3:1", "--lr: expected LOW below HIGH, found 3 and 1"),
        ("lr", "0:1", "--lr: the range is logarithmic, so LOW should be above 0"),
        ("prompt_tokens", "1.5", "--prompt-tokens: '1.5' is not a whole number"),
    ],
)
def test_a_malformed_option_is_refused_by_name(name, text, message):
    with pytest.raises(SpecError, match=re.escape(message)):
        read_option(name, text)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_holds_a_table_for_each_setting(tmp_path):
    text = '[lr]\nlow = 1\nhigh = 4\nlog = false\n[keep]\nvalues = ["0.5", "0.25"]\n[kv_shared]\nvalues = [true, false]'
    assert read_space(read_toml(write(tmp_path / "s.toml", text))) == {
        "lr": Interval(low=1.0, high=4.0, log=False, whole=False),
        "keep": Choices(values=("0.5", "0.25")),
        "kv_shared": Choices(values=(True, False)),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[lrr]\nvalues = [1]", "unknown setting 'lrr'; did you mean 'lr'"),
        ("[epochs]\nvalues = [1, 2]", "'epochs' is the same in all trials"),
        ("[seed]\nlow = 1\nhigh = 2", "'seed' is the same in all trials"),
        ("lr = 3", "[lr]: expected values = [...], or low, high"),
        ("[lr]\nlow = 1", "[lr]: expected values = [...], or low, high"),
        ("[lr]\nvalues = []", "[lr]: expected values"),
        ('[lr]\nvalues = ["a"]', "[lr]: --lr: expected float or auto, found 'a'"),
        ("[kv_shared]\nlow = 0\nhigh = 1", "[kv_shared]: takes no numbers"),
        ("", "names no setting to vary"),
    ],
)
def test_a_malformed_file_is_refused_by_its_name(tmp_path, text, message):
    with pytest.raises(SpecError) as caught:
        read_space(read_toml(write(tmp_path / "s.toml", text)))
    assert message in str(caught.value)
    assert "s.toml" in str(caught.value)


def test_the_papers_grid_is_the_default_of_their_optimizer():
    space = default_space(make(optimizer="sgd"), set())
    assert space["lr"] == Choices(values=(50.0, 25.0, 10.0, 5.0, 2.5, 1.0, 0.5, 0.25, 0.1, 0.05))
    assert space["weight_decay"] == Choices(values=(0.01, 0.001, 0.0001, 0.0))
    assert space.keys() == {"lr", "weight_decay", "prompt_tokens", "kv_tokens"}


def test_the_default_varies_only_what_the_method_knows_and_nobody_has_chosen():
    assert default_space(make(method="linear"), set()).keys() == {"lr", "weight_decay"}
    assert default_space(make(method="vapt"), {"lr"}).keys() == {"weight_decay", "prompt_tokens"}
    rates = default_space(make(), set())["lr"]
    assert isinstance(rates, Interval)
    assert rates.low < make().base_lr < rates.high


def test_where_methods_are_compared_what_each_declares_is_varied_and_rates_reach_around_all():
    alone = {name: default_space(make(method=name), set()) for name in ("linear", "e2vpt", "full")}
    space = default_space(make(method="linear"), set(), methods=tuple(alone))
    assert space.keys() == {"lr", "weight_decay", "prompt_tokens", "kv_tokens"}
    assert space["lr"].low == min(each["lr"].low for each in alone.values())
    assert space["lr"].high == max(each["lr"].high for each in alone.values())
    assert {name: space[name] for name in ("prompt_tokens", "kv_tokens")} == {
        name: alone["e2vpt"][name] for name in ("prompt_tokens", "kv_tokens")
    }


def test_values_take_the_types_of_their_settings():
    settings = with_values(make(), {"prompt_tokens": 5.0, "keep": 0.3333, "lr": 0.5, "method": "vpt-deep"})
    assert (settings.options.prompt_tokens, settings.keep, settings.lr, settings.method) == (
        5,
        "0.333",
        0.5,
        "vpt-deep",
    )
    assert isinstance(settings.options.prompt_tokens, int)


def test_a_space_is_refused_where_a_setting_would_be():
    with pytest.raises(SpecError, match="--prompt-tokens should be 0 to 1000"):
        check_space(make(), {"prompt_tokens": Choices(values=(5, 2000))})
    with pytest.raises(SpecError, match="nothing to vary"):
        check_space(make(), {})


def test_a_setting_that_no_method_of_the_sweep_knows_is_refused():
    ranks = Choices(values=(4, 8))
    with pytest.raises(SpecError, match="--lora-rank: method 'e2vpt' does not know it"):
        check_space(make(), {"lora_rank": ranks})
    check_space(make(), {"lora_rank": ranks, "method": Choices(values=("e2vpt", "lora"))})


def test_a_value_that_is_given_is_not_varied(tmp_path):
    settings, space = _plan({"data": "digits", "lr": "0.5", "prompt_tokens": "5,10"}, None, None)
    assert settings.lr == 0.5
    assert space.keys() == {"prompt_tokens", "weight_decay", "kv_tokens"}
    config = write(tmp_path / "c.toml", 'data = "digits"\nkv_tokens = 2\nweight_decay = 0.0')
    settings, space = _plan({"lr": None}, config, None)
    assert space.keys() == {"lr", "prompt_tokens"}
    assert settings.options.kv_tokens == 2


def test_a_file_replaces_the_defaults(tmp_path):
    search = write(tmp_path / "s.toml", "[lr]\nvalues = [0.1, 1.0]")
    _, space = _plan({"data": "digits", "kv_tokens": "1,2"}, None, search)
    assert space.keys() == {"lr", "kv_tokens"}


def test_trials_prune_only_where_it_is_asked_for():
    assert _plan({"data": "digits"}, None, None)[0].prune is False
    assert _plan({"data": "digits", "prune": True}, None, None)[0].prune is True
    assert _plan({"data": "digits", "keep": "0.2:0.8"}, None, None)[0].prune is True
    with pytest.raises(SpecError, match="--no-prune leaves nothing to prune"):
        _plan({"data": "digits", "keep": "0.2:0.8", "prune": False}, None, None)


def test_help_offers_what_a_sweep_adds_and_every_option_of_training(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    result = CliRunner().invoke(build_app(["sweep"]), ["sweep", "--help"])
    assert result.exit_code == 0
    for option in ("--trials", "--search", "--storage", "--study", "--pruner", "--json", "--lr", "--prompt-tokens"):
        assert re.search(rf"{option}\b", result.output)


def test_where_methods_are_compared_a_fixed_option_reaches_those_that_know_it():
    settings, space = _plan(
        {"data": "digits", "method": "vapt,e2vpt", "kv_tokens": "3", "vapt_norm": "paper", "prompt_tokens": "4"},
        None,
        None,
    )
    assert settings.method == "vapt"
    assert space["kv_tokens"] == Choices(values=(3,))
    check_space(settings, space)
    trial = with_values(settings, {"method": "e2vpt", "kv_tokens": 3, "prompt_tokens": 4})
    assert trial.options == METHODS["e2vpt"].Options(kv_tokens=3, prompt_tokens=4)
    with pytest.raises(SpecError, match="--lora-rank: method 'vapt' does not know it, only lora"):
        _plan({"data": "digits", "method": "vapt,e2vpt", "lora_rank": "3"}, None, None)


def test_every_number_of_a_method_can_be_varied():
    _, space = _plan({"data": "digits", "method": "lora", "lora_rank": "2:16"}, None, None)
    assert space["lora_rank"] == Interval(low=2.0, high=16.0, log=False, whole=True)
