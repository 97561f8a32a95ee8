"""Settings: where values come from, which are refused, and what the command line offers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import tomli_w
from typer.testing import CliRunner

from vpdeploy.cli.main import build_app
from vpdeploy.errors import SpecError
from vpdeploy_train.config import read_toml
from vpdeploy_train.data import AUGMENTATIONS
from vpdeploy_train.methods import METHODS
from vpdeploy_train.option import options_of
from vpdeploy_train.settings import Augment, TrainSettings, default_of, every_option

COMMON: dict[str, Any] = {
    "data": "photos",
    "recipe": "vtab/kitti",
    "backbone": "test_vit",
    "weights": "w.safetensors",
    "image_size": 32,
    "resize": "squash",
    "crop_ratio": 0.5,
    "normalisation": "imagenet",
    "pooling": "patches",
    "val_fraction": 0.25,
    "skip_corrupt": True,
    "head": "zero",
    "epochs": 7,
    "batch_size": 5,
    "optimizer": "sgd",
    "lr": 0.5,
    "weight_decay": 0.25,
    "head_lr_scale": 0.5,
    "warmup_epochs": 1.5,
    "grad_clip": 2.0,
    "early_stop": 4,
    "class_weights": "balanced",
    "label_smoothing": 0.1,
    "augment": "flip",
    "workers": 0,
    "seed": 9,
    "device": "cpu",
    "precision": "bf16",
    "prune": False,
    "prune_scope": "shared",
    "prune_mode": "zero",
    "prune_kv": False,
    "keep": "0.5,0.25",
    "keep_segments": "0.75",
    "keep_hidden": 0.5,
    "prune_search": "full",
    "prune_candidates": 2,
    "score_images": 99,
    "prune_slack": 0.125,
    "rewind": "fresh",
}
"""Every setting that all methods have but the method itself, none at its default."""

OWN: dict[str, dict[str, Any]] = {
    "e2vpt": {
        "prompt_tokens": 3,
        "prompt_dropout": 0.0,
        "segment_order": "strided",
        "kv_tokens": 2,
        "kv_shared": False,
    },
    "vapt": {
        "prompt_tokens": 3,
        "prompt_dropout": 0.0,
        "vapt_hidden": 4,
        "vapt_kernel": 3,
        "vapt_norm": "paper",
        "vapt_start": "zero",
    },
    "vpt-deep": {"prompt_tokens": 3, "prompt_dropout": 0.0, "segment_order": "strided"},
    "vfpt": {"prompt_tokens": 3, "prompt_dropout": 0.0, "vfpt_share": 0.25},
    "da-vpt": {"prompt_tokens": 3, "prompt_dropout": 0.0, "davpt_weight": 0.5},
    "vpt-shallow": {"prompt_tokens": 3},
    "linear": {},
    "lora": {"lora_rank": 4},
    "full": {},
}
"""Every option of every method, none at its default."""

EVERYTHING = {method: {**COMMON, "method": method, **own} for method, own in OWN.items()}
every_method = pytest.mark.parametrize("method", EVERYTHING)


def make(**values: Any) -> TrainSettings:
    return TrainSettings.of(data="digits", **values)


@every_method
def test_the_example_above_sets_everything_to_another_value_than_the_default(method):
    own = options_of(METHODS[method].Options)
    assert EVERYTHING.keys() == set(METHODS)
    assert EVERYTHING[method].keys() == {*options_of(TrainSettings), *own}
    assert not [name for name, value in COMMON.items() if value == default_of(name)]
    assert not [name for name, value in OWN[method].items() if value == own[name].default]


def test_options_win_over_the_config_and_the_config_over_defaults():
    config = {"data": "photos", "epochs": 5, "lr": 0.5}
    merged = TrainSettings.merge(config, {"epochs": 7, "lr": None, "seed": 3})
    assert (merged.data, merged.epochs, merged.lr, merged.seed) == ("photos", 7, 0.5, 3)
    assert merged.batch_size == default_of("batch_size")


def test_an_option_that_is_false_or_zero_is_given():
    merged = TrainSettings.merge(
        {"data": "digits", "prune": True, "seed": 5, "prompt_dropout": 0.5}, {"prune": False, "seed": 0}
    )
    assert (merged.prune, merged.seed, merged.options.prompt_dropout) == (False, 0, 0.5)


def test_missing_data_is_refused_with_what_to_give():
    with pytest.raises(SpecError, match=r"--data is missing: give a folder"):
        TrainSettings.merge({"epochs": 3})


@pytest.mark.parametrize(("name", "close"), [("epoch", "epochs"), ("batch-size", "batch_size"), ("LR", "lr")])
def test_an_unknown_name_is_refused_with_the_closest_one(name, close):
    with pytest.raises(SpecError, match=f"^unknown setting '{name}'; did you mean '{close}'"):
        TrainSettings.merge({"data": "digits", name: 3})


def test_a_name_unlike_any_is_refused_with_all_of_them():
    with pytest.raises(SpecError, match=r"unknown setting 'zzz'; expected one of: data, recipe, .*epochs"):
        TrainSettings.merge({"data": "digits", "zzz": 3})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("epoch = 3", "unknown setting 'epoch'; did you mean 'epochs'?"),
        ('epochs = "5"', "--epochs: expected int, found '5'"),
        ("epochs = 0", "--epochs should be at least 1, found 0"),
        ('augment = "blur"', "--augment 'blur': choose one of none, flip"),
        ('device = "tpu"', "--device 'tpu': choose one of auto, cpu, cuda"),
        ('keep = "half"', "--keep 'half': expected 'auto' or shares"),
        ('recipe = "vtab/cifar"', "--recipe 'vtab/cifar': no such recipe; did you mean vtab/cifar100"),
        ("lr = 1" + 400 * "0", "--lr: the number is too large"),
        ("[train]\nepochs = 3", "unknown setting 'train'"),
    ],
)
def test_a_refusal_names_the_file_that_the_value_stands_in(tmp_path, line, message):
    (tmp_path / "c.toml").write_text(line, encoding="utf-8")
    with pytest.raises(SpecError) as caught:
        TrainSettings.merge(read_toml(tmp_path / "c.toml"), {"data": "digits", "seed": 1})
    assert str(caught.value).startswith(f"{tmp_path / 'c.toml'}: {message}")
    assert "\n" not in str(caught.value)


def test_a_refusal_names_no_file_where_the_value_is_an_options(tmp_path):
    (tmp_path / "c.toml").write_text("epochs = 3\nseed = 1", encoding="utf-8")
    with pytest.raises(SpecError, match=r"^--epochs should be"):
        TrainSettings.merge(read_toml(tmp_path / "c.toml"), {"data": "digits", "epochs": 0})
    with pytest.raises(SpecError, match=r"^--data is missing"):
        TrainSettings.merge(read_toml(tmp_path / "c.toml"), {})


def test_every_augmentation_can_be_asked_for():
    assert set(get_args(Augment)) == set(AUGMENTATIONS)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("epochs", "5", "int"),
        ("epochs", 5.0, "int"),
        ("epochs", True, "int"),
        ("lr", "fast", "float or auto"),
        ("lr", True, "float or auto"),
        ("prune", 1, "bool"),
        ("prune", "yes", "bool"),
        ("kv_shared", 0, "bool"),
        ("backbone", 3, "str"),
        ("data", ["a"], "str"),
        ("keep", 0.5, "str"),
        ("weights", {"a": 1}, "str"),
        ("precision", 16, "str"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(name, value, expected):
    option = "--" + name.replace("_", "-")
    with pytest.raises(SpecError, match=re.escape(f"{option}: expected {expected}, found {value!r}")):
        TrainSettings.merge({"data": "digits"}, {name: value})


def test_an_integer_serves_as_a_float():
    merged = TrainSettings.merge({"data": "digits", "lr": 1, "warmup_epochs": 2})
    assert (merged.lr, merged.warmup_epochs) == (1.0, 2.0)
    assert isinstance(merged.lr, float)


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"epochs": 0}, "--epochs"),
        ({"batch_size": 0}, "--batch-size"),
        ({"prompt_tokens": -1}, "--prompt-tokens"),
        ({"prompt_tokens": 1001}, "--prompt-tokens"),
        ({"kv_tokens": -1}, "--kv-tokens"),
        ({"prompt_dropout": 1.0}, "--prompt-dropout"),
        ({"prompt_dropout": float("nan")}, "--prompt-dropout"),
        ({"grad_clip": float("inf")}, "--grad-clip"),
        ({"val_fraction": 0.0}, "--val-fraction"),
        ({"val_fraction": 1.0}, "--val-fraction"),
        ({"image_size": 7}, "--image-size"),
        ({"image_size": 4097}, "--image-size"),
        ({"crop_ratio": 0.0}, "--crop-ratio"),
        ({"crop_ratio": 1.01}, "--crop-ratio"),
        ({"crop_ratio": float("nan")}, "--crop-ratio"),
        ({"recipe": "vtab"}, "--recipe"),
        ({"augment": "blur"}, "--augment"),
        ({"device": "gpu"}, "--device"),
        ({"lr": 0.0}, "--lr"),
        ({"lr": -1.0}, "--lr"),
        ({"lr": float("nan")}, "--lr"),
        ({"lr": float("inf")}, "--lr"),
        ({"weight_decay": -0.1}, "--weight-decay"),
        ({"weight_decay": float("inf")}, "--weight-decay"),
        ({"warmup_epochs": -1.0}, "--warmup-epochs"),
        ({"warmup_epochs": 11.0, "epochs": 10}, "--warmup-epochs"),
        ({"grad_clip": -1.0}, "--grad-clip"),
        ({"grad_clip": float("nan")}, "--grad-clip"),
        ({"early_stop": -1}, "--early-stop"),
        ({"workers": -1}, "--workers"),
        ({"seed": -1}, "--seed"),
        ({"seed": 2**64}, "--seed"),
        ({"prune_candidates": 0}, "--prune-candidates"),
        ({"prune_candidates": 10}, "--prune-candidates"),
        ({"keep": "0.5,0.4", "prune_candidates": 1}, "--prune-candidates"),
        ({"prune_mode": "mask"}, "--prune-mode"),
        ({"prune_search": "grid"}, "--prune-search"),
        ({"keep_hidden": 0.0}, "--keep-hidden"),
        ({"keep_hidden": 1.5}, "--keep-hidden"),
        ({"prune_slack": 1.0}, "--prune-slack"),
        ({"prune_slack": -0.1}, "--prune-slack"),
        ({"precision": "fp8"}, "--precision"),
        ({"optimizer": "lion"}, "--optimizer"),
        ({"resize": "stretch"}, "--resize"),
        ({"prune_scope": "token"}, "--prune-scope"),
        ({"rewind": "no"}, "--rewind"),
        ({"segment_order": "random"}, "--segment-order"),
        ({"normalisation": "none"}, "--normalisation"),
        ({"keep": "half"}, "--keep"),
        ({"keep": "0.5,0"}, "--keep"),
        ({"keep": "1.5"}, "--keep"),
        ({"keep": "nan"}, "--keep"),
        ({"keep": ""}, "--keep"),
        ({"keep": "0.5,0.4", "keep_segments": "0.5,0.4,0.3"}, "--keep-segments"),
        ({"keep_segments": "none"}, "--keep-segments"),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_option(values, option):
    with pytest.raises(SpecError, match=rf"^{option}\b"):
        make(**values)


def test_every_refusal_is_one_line():
    for values in ({"epochs": 0}, {"precision": "fp8"}, {"keep": "half"}):
        with pytest.raises(SpecError) as caught:
            make(**values)
        assert "\n" not in str(caught.value)


def test_defaults_that_depend_on_other_settings():
    assert (make().base_lr, make().decay, make().prunes) == (0.03, 0.01, True)
    sgd = make(optimizer="sgd", epochs=20, method="linear")
    assert (sgd.base_lr, sgd.decay, sgd.prunes) == (0.25, 0.001, False)
    assert (make().head_scale, make(head="zero").head_scale, sgd.head_scale) == (0.03, 1.0, 1.0)
    assert make(head_lr_scale=0.5).head_scale == 0.5
    given = make(lr=3.0, weight_decay=0.0, warmup_epochs=0.0, prune=False)
    assert (given.base_lr, given.decay, given.prunes) == (3.0, 0.0, False)
    assert make(method="vpt-deep", prune=True).prunes


def test_each_method_has_its_own_default_rate():
    rates = {method: make(method=method).base_lr for method in ("vapt", "vpt-deep", "lora", "full")}
    assert rates == {"vapt": 0.1, "vpt-deep": 0.03, "lora": 4e-3, "full": 4e-4}
    assert make(method="vapt", optimizer="sgd").base_lr == 0.25
    assert make(method="vapt", lr=0.05).base_lr == 0.05


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"keep": "0.5"}, [(0.5, 0.75)]),
        ({"keep": "0.5,0.25", "keep_segments": "1"}, [(0.5, 1.0), (0.25, 1.0)]),
        ({"keep": "0.5,0.25", "keep_segments": "0.5, 0.25"}, [(0.5, 0.5), (0.25, 0.25)]),
    ],
)
def test_shares_of_tokens_and_segments_are_paired(values, expected):
    assert [(shares.tokens, shares.segments) for shares in make(**values).keep_ratios()] == expected
    assert {shares.hidden for shares in make(keep_hidden=0.5).keep_ratios()} == {0.5}


@pytest.mark.parametrize(("candidates", "count"), [(1, 1), (3, 3), (9, 9), (None, 6)])
def test_the_automatic_search_tries_as_many_shares_as_asked_for(candidates, count):
    shares = make(prune_candidates=candidates).keep_ratios()
    assert len(shares) == len({each.tokens for each in shares}) == count
    assert all(0 < each.tokens < 1 and 0 < each.segments <= 1 and each.hidden == 1 for each in shares)


@every_method
def test_settings_survive_toml(tmp_path: Path, method: str):
    settings = TrainSettings.of(**EVERYTHING[method])
    (tmp_path / "args.toml").write_text(settings.to_toml(), encoding="utf-8")
    assert read_toml(tmp_path / "args.toml") == EVERYTHING[method]
    assert TrainSettings.merge(read_toml(tmp_path / "args.toml")) == settings


def test_defaults_survive_toml(tmp_path: Path):
    (tmp_path / "args.toml").write_text(make().to_toml(), encoding="utf-8")
    again = TrainSettings.merge(read_toml(tmp_path / "args.toml"))
    assert again == make()
    assert again.difference(make()) is None


def test_a_file_that_is_not_toml_is_refused_by_name(tmp_path: Path):
    for name, content in {"a.toml": b"epochs = ", "b.toml": b"\xff\xfe\x00"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SpecError, match=rf"{name}: not a readable TOML file"):
            read_toml(tmp_path / name)
    with pytest.raises(SpecError, match=r"missing\.toml: file not found"):
        read_toml(tmp_path / "missing.toml")
    with pytest.raises(SpecError, match="not a readable TOML file"):
        read_toml(tmp_path)


def test_a_difference_names_the_option_and_both_values():
    assert make(prompt_tokens=3).difference(make(prompt_tokens=4)) == "--prompt-tokens was 3, now 4"


@pytest.fixture
def help_text(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "300")
    result = CliRunner().invoke(build_app(["train"]), ["train", "--help"])
    assert result.exit_code == 0
    return result.output


@pytest.mark.parametrize("name", every_option())
def test_help_lists_every_setting(help_text, name):
    assert re.search(rf"--{name.replace('_', '-')}\b", help_text)


@pytest.mark.parametrize("pair", [(f"--{name}", f"--no-{name}") for name in ("prune", "kv-shared", "prune-kv")])
def test_a_switch_has_both_directions(help_text, pair):
    assert all(re.search(rf"{side}\b", help_text) for side in pair)


def test_help_states_the_default_of_each_number(help_text):
    entries = re.split(r" (?=--[a-z])", " ".join(help_text.split()))
    for name in ("prompt_tokens", "kv_tokens", "epochs", "batch_size", "score_images"):
        entry = next(entry for entry in entries if entry.startswith(f"--{name.replace('_', '-')} "))
        assert f"[default: {every_option()[name].default}]" in entry


def invoke(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> TrainSettings:
    """Return what the command line would train, without training it."""
    received: list[TrainSettings] = []

    class Stop(Exception):
        pass

    def take(settings: TrainSettings, *_: object, **__: object) -> None:
        received.append(settings)
        raise Stop

    monkeypatch.setattr("vpdeploy_train.training.train_run", take)
    result = CliRunner().invoke(build_app(["train"]), ["train", *arguments])
    assert isinstance(result.exception, Stop), result.output
    return received[0]


@every_method
def test_every_setting_reaches_the_training_from_the_command_line(monkeypatch, tmp_path, method):
    arguments = ["--out", str(tmp_path / "run")]
    for name, value in EVERYTHING[method].items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        else:
            arguments += [f"--{option}", str(value)]
    assert invoke(monkeypatch, *arguments) == TrainSettings.of(**EVERYTHING[method])


def test_options_win_over_the_config_file_on_the_command_line(monkeypatch, tmp_path):
    (tmp_path / "c.toml").write_text(tomli_w.dumps({"data": "photos", "epochs": 3, "lr": 0.5}), encoding="utf-8")
    settings = invoke(monkeypatch, "--out", str(tmp_path / "r"), "--config", str(tmp_path / "c.toml"), "--epochs", "4")
    assert settings == TrainSettings(data="photos", epochs=4, lr=0.5)


@every_method
def test_a_resumed_run_needs_no_repeated_options(monkeypatch, tmp_path, method):
    (tmp_path / "args.toml").write_text(TrainSettings.of(**EVERYTHING[method]).to_toml(), encoding="utf-8")
    assert invoke(monkeypatch, "--out", str(tmp_path), "--resume") == TrainSettings.of(**EVERYTHING[method])
