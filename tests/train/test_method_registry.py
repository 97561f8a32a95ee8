"""Methods by name: what this package and others bring, what is known before torch, and what is refused."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from train.toys import dimensions_of, make_vit

from vpdeploy.errors import SpecError
from vpdeploy_train import methods
from vpdeploy_train.cli import sweep, train
from vpdeploy_train.config import SharedSettings, read_toml
from vpdeploy_train.methods import METHOD_GROUP, METHODS, MethodRegistry, method_of_run, require_storable
from vpdeploy_train.methods.e2vpt import VPTDeep
from vpdeploy_train.methods.method import NoPrompts
from vpdeploy_train.option import options_of
from vpdeploy_train.settings import VERB_WORDS, TrainSettings, every_option, usable_method, usable_methods

BUILT_IN = {
    "e2vpt": "vpdeploy_train.methods.e2vpt:E2VPT",
    "vpt-deep": "vpdeploy_train.methods.e2vpt:VPTDeep",
    "vapt": "vpdeploy_train.methods.vapt:VAPT",
}
GOOD = """
    from dataclasses import dataclass
    from typing import Literal
    from vpdeploy_train.methods.e2vpt import VPTDeep
    from vpdeploy_train.methods.options import DeepOptions
    from vpdeploy_train.option import option

    class Tilted(VPTDeep):
        @dataclass(frozen=True, kw_only=True)
        class Options(DeepOptions):
            tilt: float = option(0.5, "how far")
"""


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Installs packages that bring methods, and returns a registry that sees them."""

    def install(*packages: tuple[str, str, str]) -> MethodRegistry:
        for package, method, code in packages:
            folder = tmp_path / package
            information = folder / f"{package}-1.0.dist-info"
            information.mkdir(parents=True)
            (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
            (information / "entry_points.txt").write_text(f"[{METHOD_GROUP}]\n{method} = {package}_code:Tilted\n")
            (folder / f"{package}_code.py").write_text(textwrap.dedent(code))
            monkeypatch.syspath_prepend(folder)
        return MethodRegistry(BUILT_IN, group=METHOD_GROUP)

    yield install
    for name in [name for name in sys.modules if name.endswith("_code")]:
        del sys.modules[name]


def test_options_of_one_flag_mean_the_same_in_all_methods():
    for name in METHODS:
        for option in options_of(METHODS[name].Options).values():
            assert option.agrees_with(every_option()[option.name]), (name, option.name)
            assert option.help
            assert option.name not in options_of(TrainSettings)
    assert not METHODS.load(reserved=()).refusals


@pytest.mark.parametrize("verb", [train.train, sweep.sweep])
def test_the_verbs_own_parameters_are_reserved(verb):
    settings = {*options_of(TrainSettings), *every_option()}
    assert {*inspect.signature(verb).parameters} - settings <= VERB_WORDS


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--method", "e3vpt"),
        ("train", "--method=e3vpt"),
        ("train", "--config", "c.toml"),
        ("sweep", "--method", "vapt,e3vpt"),
    ],
)
def test_a_misspelt_method_is_refused_before_torch_is_loaded(tmp_path, arguments):
    (tmp_path / "c.toml").write_text('method = "e3vpt"', encoding="utf-8")
    program = """
    import atexit, sys
    atexit.register(lambda: print("torch" in sys.modules))
    from vpdeploy.cli.main import main
    main()
    """
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments, "--data", "digits", "--out", "run"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert re.fullmatch(
        r"error: unknown method 'e3vpt' \(did you mean e2vpt\?\); choose one of: e2vpt, vapt, .*\n", finished.stderr
    )
    assert finished.stdout == "False\n"


def test_a_method_of_another_package_is_found_by_its_entry_point(registry):
    found = registry(("tilt", "tilted", GOOD))
    assert list(found) == ["e2vpt", "vpt-deep", "vapt", "tilted"]
    assert found["tilted"].__name__ == "Tilted"
    loaded = found.load(reserved={"lr"})
    assert not loaded.refusals
    assert {name: [*methods] for name, methods in loaded.options().items() if name in ("tilt", "prompt_tokens")} == {
        "tilt": ["tilted"],
        "prompt_tokens": ["e2vpt", "vpt-deep", "vapt", "tilted"],
    }


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import no_such_library", "cannot be loaded: ModuleNotFoundError: No module named 'no_such_library'"),
        ("1 / 0", "cannot be loaded: ZeroDivisionError: division by zero"),
        ("Tilted = 3", "cannot be loaded: TypeError: 3 is no subclass of PromptMethod"),
        ("pass", "cannot be loaded: AttributeError: module 'tilt_code' has no attribute 'Tilted'"),
        (GOOD.replace('option(0.5, "how far")', "0.5"), "cannot be loaded: TypeError: Tilted.Options: declare 'tilt'"),
        (GOOD.replace("tilt: float", "tilt: list"), "cannot be loaded: TypeError: setting 'tilt' is a <class 'list'>"),
        (GOOD.replace('"how far"', "None"), "cannot be loaded: TypeError: setting 'tilt' says None for --help"),
        (
            GOOD.replace('"how far"', '"far", limits=(0, 1)'),
            "cannot be loaded: TypeError: setting 'tilt' has the limits",
        ),
        (
            GOOD.replace("0.5", "__import__('dataclasses').MISSING"),
            "cannot be loaded: TypeError: Tilted.Options: 'tilt'",
        ),
        (GOOD.replace("0.5", '"half"'), "cannot be loaded: SpecError: --tilt: expected float, found 'half'"),
        (
            GOOD.replace("tilt: float", "tilt: Literal['far']"),
            "cannot be loaded: SpecError: --tilt: expected str, found",
        ),
        (GOOD.replace("@dataclass", "# @dataclass"), "cannot be loaded: TypeError: Tilted.Options is no dataclass"),
        (GOOD + "\n        rates = 0.1\n", "cannot be loaded: TypeError: Tilted.rates is 0.1; expected Rates"),
        (GOOD + "\n        form = 'prefx'\n", "cannot be loaded: TypeError: Tilted.form is 'prefx'; expected one of"),
        (GOOD + "\n        parts = {'token'}\n", "cannot be loaded: TypeError: Tilted.parts: expected some of tokens,"),
        ("import sys; sys.exit(3)", "cannot be loaded: SystemExit: 3"),
        (GOOD.replace("tilt: float", "no_kv_shared: bool").replace("0.5", "False"), "means something else by --no-kv"),
        (GOOD.replace("tilt: float", "no_prune: bool").replace("0.5", "False"), "means something else by --no-prune"),
        (GOOD.replace("tilt: float", "lr: float"), "means something else by --lr than"),
        (
            GOOD.replace("tilt: float = option(0.5", "prompt_tokens: int = option(5"),
            "means something else by --prompt-t",
        ),
    ],
)
def test_a_broken_package_is_named_in_one_line_and_harms_no_other_method(registry, code, reason):
    loaded = registry(("tilt", "tilted", code)).load(reserved={"lr", "no_prune"})
    assert [*loaded.kinds] == [*BUILT_IN]
    line = loaded.refusals["tilted"]
    assert line.startswith(f"method 'tilted' of package 'tilt' {reason}")
    assert "\n" not in line


def test_a_name_of_this_package_stays_with_it(registry):
    found = registry(("tilt", "vapt", GOOD))
    assert found["vapt"].__name__ == "VAPT"
    loaded = found.load(reserved=())
    assert [*loaded.kinds] == [*BUILT_IN]
    assert loaded.refusals == {
        "vapt": "package 'tilt' brings a method 'vapt', which vpdeploy has itself: not used",
    }


def test_a_name_that_two_packages_bring_is_neithers(registry):
    found = registry(("tilt", "tilted", GOOD), ("slant", "tilted", GOOD))
    with pytest.raises(SpecError, match=r"^method 'tilted' is brought by packages 'slant' and 'tilt'; uninstall all"):
        found.named("tilted")
    assert [*found.load(reserved=()).kinds] == [*BUILT_IN]


def test_what_an_uninstallation_left_behind_harms_nothing(registry, tmp_path):
    found = registry(("tilt", "tilted", GOOD), ("slant", "tilted", GOOD))
    (tmp_path / "slant" / "slant-1.0.dist-info" / "METADATA").unlink()
    loaded = found.load(reserved=())
    assert [*loaded.kinds] == [*BUILT_IN]
    assert "'tilt' and 'unknown'" in loaded.refusals["tilted"]


def test_what_switches_off_a_common_setting_is_reserved(registry, monkeypatch):
    code = GOOD.replace("tilt: float", "no_prune: bool").replace("0.5", "False")
    monkeypatch.setattr("vpdeploy_train.settings.METHODS", registry(("tilt", "tilted", code)))
    assert "--no-prune" in usable_methods.__wrapped__().refusals["tilted"]


@pytest.mark.parametrize(
    ("member", "returned", "reason"),
    [
        ("structure", lambda self: {"rank": torch.tensor(3)}, "its structure is not JSON: "),
        ("structure", lambda self: {"scale": float("nan")}, "its structure is not JSON: "),
        ("structure", lambda self: [1], "its structure is no dictionary"),
        ("structure", lambda self: {}, "it cannot restore what it has just stored: "),
        ("summary", lambda self: {"tokens": 3}, "its summary does not count the 'parameters'"),
        ("restore", classmethod(lambda cls, *_: NoPrompts()), "what it restores differs in the tensor 'kv.0'"),
        ("restore", classmethod(lambda cls, *_: torch.empty(-1)), "it cannot restore what it has just stored: "),
        ("restore", classmethod(lambda cls, *_: None.shape), "it cannot restore what it has just stored: "),
    ],
)
def test_a_method_whose_run_could_not_be_stored_is_refused_before_it_is_trained(monkeypatch, member, returned, reason):
    unstorable = type("Unstorable", (VPTDeep,), {member: returned})
    monkeypatch.setattr(methods, "method_of_run", lambda name: unstorable)
    dimensions = dimensions_of(make_vit())
    method = unstorable.create(dimensions, unstorable.Options(), torch.Generator())
    with pytest.raises(SpecError, match=f"^method 'unstorable': {re.escape(reason)}"):
        require_storable("unstorable", method, dimensions)


def test_every_method_of_this_package_can_be_stored_and_read():
    dimensions = dimensions_of(make_vit())
    before = torch.get_rng_state()
    for name in METHODS:
        method = METHODS[name].create(dimensions, METHODS[name].Options(), torch.Generator())
        require_storable(name, method, dimensions)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_of_a_method_that_is_not_installed_says_what_to_install():
    with pytest.raises(SpecError, match=r"^method 'tilted' is not installed: .*install the package that brings it"):
        method_of_run("tilted")


def test_an_option_that_the_method_does_not_know_is_refused_with_those_that_do():
    message = r"^--kv-tokens: method 'vapt' does not know it, only e2vpt; leave it away$"
    with pytest.raises(SpecError, match=message):
        TrainSettings.of(data="digits", method="vapt", kv_tokens=3)
    with pytest.raises(SpecError, match=message):
        TrainSettings.merge(SharedSettings(kv_tokens=4), {"data": "digits", "method": "vapt", "kv_tokens": 3})


def test_what_a_file_or_a_recipe_says_for_other_methods_is_left_out(tmp_path):
    (tmp_path / "c.toml").write_text("kv_tokens = 3\nlora_rank = 2\nprompt_tokens = 7", encoding="utf-8")
    layer = read_toml(tmp_path / "c.toml")
    settings = TrainSettings.merge(layer, {"data": "digits", "method": "vapt", "kv_tokens": 3})
    assert settings.options == usable_method("vapt").Options(prompt_tokens=7)
    asked = {"data": "digits", "method": "linear", "recipe": "vtab/dtd", "prompt_tokens": 10}
    assert TrainSettings.merge(asked).options == usable_method("linear").Options()


def test_a_file_is_refused_where_what_it_says_for_another_method_has_the_wrong_type(tmp_path):
    (tmp_path / "c.toml").write_text('kv_tokens = "3"', encoding="utf-8")
    with pytest.raises(SpecError, match=r"c\.toml: --kv-tokens: expected int, found '3'"):
        TrainSettings.merge(read_toml(tmp_path / "c.toml"), {"data": "digits", "method": "vapt"})


def test_settings_that_list_every_methods_options_are_still_read(tmp_path):
    stored = """
    data = "digits"
    method = "vapt"
    prompt_tokens = 4
    kv_tokens = 2
    kv_shared = true
    prompt_dropout = 0.1
    vapt_hidden = 3
    lora_rank = 8
    segment_order = "contiguous"
    """
    (tmp_path / "args.toml").write_text(textwrap.dedent(stored), encoding="utf-8")
    settings = TrainSettings.merge(read_toml(tmp_path / "args.toml"))
    assert settings == TrainSettings.of(data="digits", method="vapt", prompt_tokens=4, vapt_hidden=3)


def test_options_of_another_method_are_refused():
    with pytest.raises(SpecError, match=r"method 'vapt' has options of its own, VAPT\.Options, found E2VPT\.Options"):
        TrainSettings(data="digits", method="vapt", options=METHODS["e2vpt"].Options())


def test_another_method_keeps_what_was_chosen_and_it_knows():
    chosen = TrainSettings.of(data="digits", prompt_tokens=4, kv_tokens=2).changed(method="vapt", vapt_hidden=3)
    assert chosen.options == usable_method("vapt").Options(prompt_tokens=4, vapt_hidden=3)
