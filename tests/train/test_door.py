"""What is wrong with a command line and can be told without torch is told without it, in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
from timm.models import list_models, model_entrypoint

from vpdeploy_export.cli.convert import TARGET_NAMES
from vpdeploy_export.targets import TARGETS
from vpdeploy_train.catalogue import EMBEDDED, read_catalogue, unknown_backbone
from vpdeploy_train.cli.door import values_in
from vpdeploy_train.cli.import_run import FORMAT_NAMES
from vpdeploy_train.cli.usage import declared_options
from vpdeploy_train.importing import FORMATS
from vpdeploy_train.settings import usable_methods
from vpdeploy_train.trunks import TRUNKS

PROGRAM = """
import contextlib, io, json, sys
from vpdeploy.cli.main import main
answers = []
for arguments in json.load(sys.stdin):
    sys.argv = ["vpdeploy", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code
    heavy = [name for name in ("torch", "timm", "onnx", "onnxruntime", "datasets", "optuna") if name in sys.modules]
    answers.append([code, out.getvalue(), err.getvalue(), heavy])
json.dump(answers, sys.stdout)
"""

TRAIN = "train --data digits --out new"

CASES: Mapping[str, tuple[str, str]] = {
    # name: the command line, and what is said
    "name with a slash": (f"{TRAIN} --name a/b", "'a/b' cannot name a task"),
    "name that leads out": (f"{TRAIN} --name=../x", "'../x' cannot name a task"),
    "name that is empty": (f"{TRAIN} --name=", "'' cannot name a task"),
    "name that looks like an option": (f"{TRAIN} --name -x", "'-x' cannot name a task"),
    "folder whose name is no task's": ("train --data digits --out my+task", "give another with --name, e.g. --name my"),
    "folder of foreign letters": ("train --data digits --out ünï🌹", "give another with --name"),
    "folder that is not empty": ("train --data digits --out full", "full: exists and is not empty; give another --out"),
    "file in the folder's place": ("train --data digits --out full/file", "exists and is not empty"),
    "nothing to resume": (f"{TRAIN} --resume", "nothing to resume"),
    "recipe": (f"{TRAIN} --recipe fgvc/cup", "no such recipe; did you mean fgvc/cub?"),
    "method": (f"{TRAIN} --method e2vp", "unknown method 'e2vp' (did you mean e2vpt?); choose"),
    "backbone": (f"{TRAIN} --backbone vit_bass_patch16_224", "did you mean vit_base_patch16_224"),
    "beginning of a backbone": (f"{TRAIN} --backbone vit_mini", "did you mean vit_mini_patch8_64"),
    "weights of a backbone": (
        f"{TRAIN} --backbone vit_base_patch16_224.augreg",
        "no weights 'augreg' of vit_base_patch16_224; did you mean vit_base_patch16_224.augreg",
    ),
    "backbone of another family": (f"{TRAIN} --backbone resnet18", "cannot take prompts: it is a ResNet"),
    "backbone with advice": (f"{TRAIN} --backbone swinv2_tiny_window8_256", "use a swin_* of the first version"),
    "plain backbone": (f"{TRAIN} --backbone plain_vit_patch4_18_w48_d3_h3_m100", "multiple of the patch size"),
    "plain backbone without weights": (f"{TRAIN} --backbone plain_vit_patch4_16_w48_d3_h3_m100", "--weights FILE"),
    "weights file": (f"{TRAIN} --weights none.pth", "none.pth: file not found"),
    "weights that are a folder": (f"{TRAIN} --weights full", "full: is a folder, expected a file"),
    "weights that are text": (f"{TRAIN} --weights full/file", "full/file: cannot be read as safetensors, .npz or a to"),
    "weights that are cut off": (f"{TRAIN} --weights full/cut.pth", "it is truncated: 40 bytes found"),
    "weights that are empty": ("import full/empty.pth --format vpt --out new", "it is empty, 0 bytes"),
    "settings file": (f"{TRAIN} --config none.toml", "none.toml: file not found"),
    "method in a settings file": (f"{TRAIN} --config full/wrong.toml", "unknown method 'magic'"),
    "data": ("train --data digit --out new", "unknown data 'digit'"),
    "data of a task": ("train --data digits:partiy --out new", "unknown task 'digits:partiy'; expected one of: digits"),
    "number out of range": (f"{TRAIN} --epochs 0", "--epochs should be"),
    "rate out of range": (f"{TRAIN} --lr -1", "--lr should be"),
    "choice": (f"{TRAIN} --precision fp8", "--precision 'fp8': choose one of"),
    "data in a folder that is not there": ("train --data vtab:none --out new", "--data 'vtab:none': none is not there"),
    "data in a settings file": ("train --out new --config full/gone.toml", "unknown data 'gone'"),
    "study": ("sweep --data digits --out new --study a/b", "--study 'a/b' cannot name a task"),
    "sweep's data": ("sweep --data gone --out new", "unknown data 'gone'"),
    "sweep's methods": ("sweep --data digits --out new --method e2vpt,magic", "unknown method 'magic'"),
    "sweep's folder": ("sweep --data digits --out full/file", "full/file: exists and is no folder"),
    "sweep's space": ("sweep --data digits --out new --search none.toml", "none.toml: file not found"),
    "run to evaluate": ("eval none", "none: not a finished run"),
    "split to evaluate": ("eval none --split tset", "--split 'tset': choose one of train, val, test"),
    "run to export": ("export none --out new.onnx", "none: not a finished run"),
    "artifact to verify": ("verify none", "none: does not exist"),
    "run to verify": ("verify full --run none", "none: not a finished run"),
    "bundle to convert": ("convert none --to triton --out new", "none"),
    "target": ("convert none --to tritn --out new", "--to 'tritn': choose one of onnx-adapter, triton, ep-context"),
    "run to add": ("task add none none", "none"),
    "format": ("import full/ckpt.pth --format vptt --out new", "--format 'vptt': choose one of e2vpt, vapt, vpt"),
    "checkpoint": ("import none.pth --format vpt --out new", "none.pth: file not found; expected a torch file"),
    "folder to import to": ("import full/ckpt.pth --format vpt --out full", "full: exists and is not empty"),
    "name to import as": ("import full/ckpt.pth --format vpt --out new --name a/b", "'a/b' cannot name a task"),
    "folder that names no import": ("import full/ckpt.pth --format vpt --out ünï", "give another with --name"),
    "backbone to import on": ("import full/ckpt.pth --format vpt --out new --backbone resnet18", "it is a ResNet"),
    "labels to import": ("import full/ckpt.pth --format vpt --out new --labels none.txt", "none.txt: file not found"),
    "quickstart's folder": ("quickstart --keep full", "full: exists and is not empty"),
}


USAGE: Mapping[str, tuple[str, str]] = {
    "option that there is not": (f"{TRAIN} --epoch 3", "No such option: --epoch"),
    "option of no method": (f"{TRAIN} --prompt-token 3", "--prompt-token"),
    "value that is no number": (f"{TRAIN} --epochs many", "--epochs"),
    "number of a method": (f"{TRAIN} --prompt-tokens many", "--prompt-tokens"),
    "value that lacks": (f"{TRAIN} --epochs", "--epochs"),
    "folder that lacks": ("train --data digits", "--out"),
    "argument too many": (f"{TRAIN} stray", "stray"),
    "switch that there is not": (f"{TRAIN} --no-lr", "--no-lr"),
    "sweep's option": ("sweep --data digits --out new --trial 3", "--trial"),
    "sweep's number": ("sweep --data digits --out new --trials few", "--trials"),
}


@dataclass(frozen=True, kw_only=True)
class Answer:
    code: int
    out: str
    err: str
    heavy: list[str]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """What every case says, asked one after the other of one process that has loaded nothing."""
    folder = tmp_path_factory.mktemp("door")
    (folder / "full").mkdir()
    (folder / "full" / "file").write_text("mine")
    (folder / "full" / "cut.pth").write_bytes(b"PK\x03\x04" + bytes(36))
    (folder / "full" / "empty.pth").touch()
    (folder / "full" / "ckpt.pth").write_bytes(b"\x80\x02 a pickle, by its beginning")
    (folder / "full" / "wrong.toml").write_text('method = "magic"\n')
    (folder / "full" / "gone.toml").write_text('data = "gone"\n')
    before = sorted(folder.rglob("*"))
    asked = {**CASES, **USAGE}
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        input=json.dumps([line.split() for line, _ in asked.values()]),
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONUTF8": "1"},
    )
    assert finished.returncode == 0, finished.stderr
    assert sorted(folder.rglob("*")) == before
    found = json.loads(finished.stdout)
    return {
        name: Answer(code=code, out=out, err=err, heavy=heavy)
        for name, (code, out, err, heavy) in zip(asked, found, strict=True)
    }


@pytest.mark.parametrize("case", CASES)
def test_a_cheap_error_is_one_line_before_torch_is_loaded(answers: dict[str, Answer], case: str):
    answer = answers[case]
    assert (answer.code, answer.out, answer.heavy) == (1, "", []), answer.err
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1
    assert CASES[case][1] in answer.err


@pytest.mark.parametrize("case", USAGE)
def test_a_wrong_command_line_is_told_before_torch_is_loaded(answers: dict[str, Answer], case: str):
    answer = answers[case]
    assert (answer.code, answer.out, answer.heavy) == (2, "", []), answer.err
    verb = USAGE[case][0].partition(" ")[0]
    assert answer.err.startswith((f"Usage: vpdeploy {verb} [OPTIONS]", "Error: "))
    assert USAGE[case][1] in answer.err


def test_the_options_that_sources_declare_are_those_of_the_methods():
    own = usable_methods().options()
    loaded = {name: next(iter(each.values())) for name, each in own.items()}
    assert declared_options() == {
        name: each.kind if each.kind in (bool, int, float) else str for name, each in loaded.items()
    }


def test_every_name_that_timm_knows_passes_the_door():
    catalogue = read_catalogue()
    assert catalogue is not None
    own = {name for name in list_models() if model_entrypoint(name).__module__.startswith("timm.")}
    assert len(own) > 1000
    assert own <= {*catalogue.architectures}
    refused = [refusal for name in timm.list_models(pretrained=True) if (refusal := catalogue.refusal(name))]
    assert [each for each in refused if "cannot take prompts" not in each] == []


def test_only_classes_that_prompts_do_not_enter_are_refused_by_name():
    catalogue = read_catalogue()
    assert catalogue is not None
    usable = {trunk.model_type.__name__ for trunk in TRUNKS}
    for name in ("vit_base_patch16_224", "deit3_small_patch16_224", "eva02_tiny_patch14_224", "beit3_base_patch16_224"):
        assert catalogue.refusal(name) is None
    assert all(catalogue.refusal(name) is None for name, kind in catalogue.architectures.items() if kind in usable)


def test_the_names_at_the_door_are_those_inside():
    assert sorted(FORMAT_NAMES) == sorted(FORMATS)
    assert sorted(TARGET_NAMES) == sorted(TARGETS)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--data a --data b", {"data": "b"}),
        ("--data=a=b --resume --prompt-tokens 5", {"data": "a=b", "resume": ""}),
        ("--name --data", {"name": "--data"}),
        ("--data", {}),
        ("--data a -- --name b", {"data": "a"}),
        ("--epochs 3 stray --method x", {"method": "x"}),
    ],
)
def test_a_command_line_is_read_as_typer_reads_it(line: str, expected: dict[str, str]):
    assert values_in(line.split()) == expected


def test_the_embedded_backbone_is_the_one_that_timm_is_told_of():
    from vpdeploy_train import embedded

    assert embedded.NAME == EMBEDDED
    assert timm.is_model(EMBEDDED)
    assert Path(embedded.WEIGHTS).name == f"{EMBEDDED}.safetensors"


def test_a_misspelt_backbone_is_told_names_that_begin_as_it_does():
    known = ["flexivit_base", "vit_base_patch8_224", "vit_base_patch16_224", "vit_giant_patch14_224"]
    for asked in ("vit_bass", "vit_base_patch16_242"):
        assert "flexivit" not in unknown_backbone(asked, known)
        assert "vit_base_patch16_224" in unknown_backbone(asked, known)
    assert "flexivit_base" in unknown_backbone("flexivit_bass", known)
