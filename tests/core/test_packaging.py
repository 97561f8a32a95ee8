from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest
from core import toy

from vpdeploy.format.bundle import write_bundle
from vpdeploy.format.layout import Layout
from vpdeploy.format.run import RunCard

ROOT = Path(__file__).parents[2]
RUN = "tests/golden/version1/run"
HEAVY = (
    "torch",
    "torchvision",
    "timm",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnxruntime",
    "PIL",
    "fastapi",
    "safetensors",
)

HIDE = textwrap.dedent(
    """
    import sys

    class Hidden:
        def find_spec(self, name, path=None, target=None):
            if name.partition('.')[0] in HIDDEN:
                raise ModuleNotFoundError(f"No module named '{name}'", name=name)
            return None

    sys.meta_path.insert(0, Hidden())
    """
)


def python(program: str, *arguments: str, hidden: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh interpreter in which some packages cannot be imported."""
    whole = f"HIDDEN = {set(hidden)!r}\n{HIDE}\n{textwrap.dedent(program)}"
    return subprocess.run(
        [sys.executable, "-c", whole, *arguments], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
    )


def command(*arguments: str, hidden: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run the command line in a fresh interpreter in which some packages cannot be imported."""
    return python(
        "import sys; sys.argv[0] = 'vpdeploy'; from vpdeploy.cli.main import main; main()", *arguments, hidden=hidden
    )


def test_the_packages_import_each_other_in_one_direction_only():
    pytest.importorskip("importlinter", reason="needs the dev extra")
    program = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "0 broken" in finished.stdout


@pytest.mark.parametrize(
    "program",
    [
        "import vpdeploy",
        "import vpdeploy.session.session, vpdeploy.format.bundle, vpdeploy.image",
        "import vpdeploy.inspection.report, vpdeploy.bench.benchmark, vpdeploy.bench.foreign",
        "from vpdeploy.cli.main import build_app; build_app()",
        "import vpdeploy_train.cli.train, vpdeploy_export.cli.export, vpdeploy_export.cli.task_add",
    ],
)
def test_importing_loads_no_heavy_package(program: str):
    finished = python(f"{program}\nprint(sorted(set({HEAVY!r}) & set(sys.modules)))")
    assert finished.stdout == "[]\n", finished.stderr


@pytest.mark.parametrize(
    "arguments", [("--help",), ("--version",), ("eval", "--help"), ("export", "--help"), ("predict", "--help")]
)
def test_asking_for_help_loads_no_heavy_package(arguments: tuple[str, ...]):
    program = f"""
    import atexit, sys
    atexit.register(lambda: print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr))
    sys.argv[0] = 'vpdeploy'
    from vpdeploy.cli.main import main
    main()
    """
    finished = python(program, *arguments)
    assert finished.returncode == 0
    assert finished.stdout
    assert finished.stderr == "[]\n"


@pytest.mark.parametrize("verb", ["train", "sweep"])
def test_help_of_a_training_verb_loads_torch_for_the_methods_options_and_no_timm(verb: str):
    program = f"""
    import atexit, sys
    atexit.register(lambda: print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr))
    sys.argv[0] = 'vpdeploy'
    from vpdeploy.cli.main import main
    main()
    """
    finished = python(program, verb, "--help")
    assert "--vapt-kernel" in finished.stdout
    assert finished.stderr == "['torch']\n"


@pytest.mark.parametrize("package", ["vpdeploy", "vpdeploy_train"])
def test_importing_a_package_loads_nothing_outside_the_standard_library(package: str):
    finished = python(
        f"import {package}\n"
        "heavy = {'numpy', 'typer', 'click', 'rich', 'torch', 'timm'}\n"
        "print(sorted({m.partition('.')[0] for m in sys.modules} & heavy))"
    )
    assert finished.stdout == "[]\n", finished.stderr


@pytest.mark.parametrize(
    ("verb", "hidden", "extra"),
    [
        (("train", "--data", "digits", "--out", "run"), "torch", "train"),
        (("train", "--data", "digits", "--out", "run"), "timm", "train"),
        (("eval", RUN, "--data", "digits"), "torch", "train"),
        (("export", RUN, "--out", "task.onnx"), "torch", "train"),
        (("export", RUN, "--out", "task.onnx"), "onnx_ir", "export"),
        (("serve", "zoo"), "fastapi", "serve"),
        (("serve", "zoo"), "uvicorn", "serve"),
    ],
)
def test_a_missing_extra_is_named_with_the_command_that_installs_it(verb: tuple[str, ...], hidden: str, extra: str):
    finished = command(*verb, hidden=(hidden,))
    assert finished.stderr == f"error: '{hidden}' is not installed: pip install 'vpdeploy[{extra}]'\n"
    assert finished.stdout == ""
    assert finished.returncode == 3


def test_task_add_names_a_missing_extra_where_bundle_and_run_fit(tmp_path: Path):
    card = RunCard.read(ROOT / RUN).task
    shared: dict[str, Any] = {"backbone": card.backbone, "preprocessing": card.preprocessing}
    layout = Layout.for_backbone(card.backbone, dtype="float32")
    (tmp_path / "staged.onnx").write_bytes(b"graph")
    prompt_sets = [toy.prompt_set(layout=layout, **shared)]
    write_bundle(tmp_path / "zoo", toy.facts(layout=layout, **shared), prompt_sets, tmp_path / "staged.onnx")
    finished = command("task", "add", str(tmp_path / "zoo"), RUN, hidden=("torch",))
    assert finished.stderr == "error: 'torch' is not installed: pip install 'vpdeploy[train]'\n"
    assert (finished.returncode, finished.stdout) == (3, "")


def test_help_works_without_any_extra():
    finished = command("--help", hidden=HEAVY)
    assert finished.returncode == 0, finished.stderr
    for verb in ("train", "export", "predict", "serve", "inspect", "task"):
        assert verb in finished.stdout


EDGE_HIDES = (
    *("torch", "torchvision", "timm", "onnx", "onnx_ir", "onnxscript", "safetensors", "PIL", "sklearn", "matplotlib"),
    *("lightning_fabric", "fastapi", "uvicorn", "starlette", "prometheus_client", "tqdm", "tomli_w"),
)


def test_the_runtime_needs_only_numpy_typer_and_onnxruntime(zoo: Path, folded_flowers: Path):
    program = """
    import sys
    import numpy as np
    import vpdeploy
    from vpdeploy.errors import MissingExtraError
    pixels = np.zeros((2, 32, 32, 3), np.uint8)
    for path in sys.argv[1:]:
        with vpdeploy.load(path) as session:
            answers = session.predict(pixels, "flowers", top=4)
            print([each.label for each in answers[0].ranking] == [each.label for each in answers[1].ranking])
            try:
                session.predict(pixels[:, :16], "flowers")
            except MissingExtraError as error:
                print(error)
    """
    finished = python(program, str(zoo), str(folded_flowers), hidden=EDGE_HIDES)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "True\n'PIL' is not installed: pip install 'vpdeploy[serve]'\n" * 2


def test_bundles_are_listed_changed_and_inspected_without_any_extra(zoo_copy: Path, folded_flowers: Path):
    for arguments in (
        ("inspect", str(zoo_copy)),
        ("inspect", str(folded_flowers)),
        ("task", "list", str(zoo_copy)),
        ("task", "remove", str(zoo_copy), "birds"),
    ):
        finished = command(*arguments, hidden=EDGE_HIDES)
        assert finished.returncode == 0, finished.stderr
        assert finished.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    pytest.importorskip("build", reason="needs the dev extra")
    pytest.importorskip("hatchling", reason="needs the dev extra")
    out = tmp_path_factory.mktemp("wheel")
    # Not from the root itself: a folder named "build" there would shadow the module of that name.
    finished = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)],
        capture_output=True,
        text=True,
        cwd=out,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_three_packages_and_nothing_else(wheel: zipfile.ZipFile):
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vpdeploy", "vpdeploy_train", "vpdeploy_export"}
    suffixes = {Path(name).suffix for name in wheel.namelist() if ".dist-info/" not in name}
    assert suffixes <= {".py", ".typed", ".safetensors", ".html", ".css", ".js", ".svg", ""}
    assert not [name for name in wheel.namelist() if "test" in name or "pretrain" in name or "__pycache__" in name]


def test_the_wheel_holds_every_module_of_the_source_tree(wheel: zipfile.ZipFile):
    held = set(wheel.namelist())
    for folder in ("", "train", "export"):
        for package in (ROOT / folder).glob("vpdeploy*"):
            if (package / "__init__.py").is_file():
                expected = {str(file.relative_to(ROOT / folder)) for file in package.rglob("*.py")}
                assert expected <= held


def test_the_wheel_holds_the_playgrounds_page(wheel: zipfile.ZipFile):
    folder = "vpdeploy/server/playground/"
    held = {name.removeprefix(folder) for name in wheel.namelist() if name.startswith(folder)}
    assert held == {file.name for file in (ROOT / folder).iterdir()}
    assert {"index.html", "playground.css", "playground.js"} <= held


def test_the_wheel_tells_type_checkers_that_it_is_typed(wheel: zipfile.ZipFile):
    for package in ("vpdeploy", "vpdeploy_train", "vpdeploy_export"):
        assert f"{package}/py.typed" in wheel.namelist()


def test_the_wheel_holds_the_embedded_weights_within_four_megabytes(wheel: zipfile.ZipFile):
    (weights,) = [info for info in wheel.infolist() if info.filename.endswith(".safetensors")]
    assert weights.filename == "vpdeploy_train/assets/vit_mini_patch8_64.safetensors"
    assert 0 < weights.file_size <= 4_000_000


def test_the_wheel_declares_the_command_and_the_verbs(wheel: zipfile.ZipFile):
    (name,) = [name for name in wheel.namelist() if name.endswith("/entry_points.txt")]
    text = wheel.read(name).decode()
    assert "[console_scripts]\nvpdeploy = vpdeploy.cli.main:main" in text
    assert "[vpdeploy.verbs]" in text
    for verb in ("train", "eval", "export", "task.add"):
        assert f"\n{verb} = " in text


def test_the_wheel_needs_only_numpy_typer_and_a_runtime_without_extras(wheel: zipfile.ZipFile):
    (name,) = [name for name in wheel.namelist() if name.endswith("/METADATA")]
    lines = wheel.read(name).decode().splitlines()
    required = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    always = sorted(line.partition(">")[0] for line in required if "extra ==" not in line)
    assert always == ["numpy", "onnxruntime", "onnxruntime-gpu", "typer"]


def test_the_packages_type_check_strictly():
    pytest.importorskip("mypy", reason="needs the dev extra")
    finished = subprocess.run(
        [sys.executable, "-m", "mypy"], capture_output=True, text=True, cwd=ROOT, env=dict(os.environ), check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
