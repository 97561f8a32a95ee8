"""The example of docs/add-a-method.md: installed as a package of its own, trained, pruned, exported and served."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "vpdeploy-factored"
PAGE = ROOT / "docs" / "add-a-method.md"

PROGRAM = """
import sys
import numpy as np
import tiny_runs, torch
from pathlib import Path
from traces import SharedTraces
from typer.testing import CliRunner
import vpdeploy
from vpdeploy.cli.main import build_app
from vpdeploy_train.methods import METHODS
from vpdeploy_train.prompted import normalise_pixels
from vpdeploy_train.run import Run

torch.onnx.export = SharedTraces(Path(sys.argv[1]))

def call(*arguments):
    result = CliRunner().invoke(build_app(arguments), list(arguments))
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout

weights = str(tiny_runs.write_weights(Path("vit.safetensors")))
common = ["--data", "photos", "--backbone", tiny_runs.NAME, "--weights", weights, "--device", "cpu", "--epochs", "1"]
common += ["--batch-size", "8", "--prompt-tokens", "4"]
assert "--factored-rank" in call("train", "--help")
pruning = ["--prune", "--keep", "0.5", "--prune-slack", "0.99", "--head", "zero"]
call("train", *common, "--method", "factored", "--factored-rank", "3", *pruning, "--out", "factored")
call("train", *common, "--method", "vpt-deep", "--no-prune", "--out", "deep")
run = Run.read(Path("factored"))
assert run.structure["rank"] == 3
assert [len(block) for block in run.structure["kept"]["tokens"]] == [2, 2, 2]
assert "val" in call("eval", "factored", "--split", "val")
space = ["--lr", "0.1,0.2", "--factored-rank", "2:4", "--prompt-tokens", "2", "--weight-decay", "0"]
call("sweep", *common[:-2], "--method", "factored", *space, "--trials", "1", "--pruner", "none", "--out", "sweep")

call("export", "factored", "--out", "factored.onnx")
call("export", "factored", "deep", "--out", "zoo")
pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
model = run.load_model(run.load_backbone())
mean, std = (torch.tensor(values) for values in (run.card.preprocessing.mean, run.card.preprocessing.std))
with torch.no_grad():
    expected = model(normalise_pixels(torch.from_numpy(pixels), mean, std)).numpy()
for path in ("factored.onnx", "zoo"):
    with vpdeploy.load(path) as session, session.lease("factored") as lease:
        found = session.run(pixels, np.full(len(pixels), lease.slot, np.int32))[:, :2]
        assert np.abs(found - expected).max() < 1e-4 * max(1, np.abs(expected).max()), path
picture = str(next(Path("photos").rglob("*.png")))
assert call("predict", "zoo", picture, "--task", "factored").strip()
print(list(METHODS)[-1], "done")
"""


def run_python(folder: Path, program: str, *arguments: str, path: list[Path]) -> subprocess.CompletedProcess[str]:
    inherited = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), *inherited])}
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example package, built and installed into a folder of its own, with no network."""
    folder = tmp_path_factory.mktemp("package")
    source, target = folder / "source", folder / "target"
    shutil.copytree(EXAMPLE, source)
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *offline, "--target", str(target), str(source)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return target


def test_a_method_of_another_package_is_trained_pruned_swept_exported_and_served(installed, tmp_path, shared_traces):
    source = np.random.default_rng(0)
    for label, colour in (("red", 0), ("blue", 2)):
        for number in range(12):
            pixels = source.integers(0, 60, (32, 32, 3), dtype=np.uint8)
            pixels[..., colour] += 120
            picture = tmp_path / "photos" / label / f"{number}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(picture)
    finished = run_python(tmp_path, PROGRAM, str(shared_traces), path=[installed, ROOT / "tests"])
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout == "factored done\n"

    # Without the package the run says what is missing.
    read = "import sys, tiny_runs, vpdeploy.cli.main as cli; sys.argv[1:] = ['eval', 'factored']; cli.main()"
    missing = run_python(tmp_path, read, path=[ROOT / "tests"])
    assert missing.returncode == 1
    line = r"error: factored/task\.json: method 'factored' is not installed: .*install the package that brings it"
    assert re.fullmatch(line, missing.stderr.splitlines()[-1]), missing.stderr


def test_the_page_shows_the_example_as_it_is():
    page = PAGE.read_text(encoding="utf-8")
    for language, name in (("toml", "pyproject.toml"), ("python", "vpdeploy_factored.py")):
        block = re.search(rf"```{language}\n# {re.escape(name)}\n(.*?)```", page, re.DOTALL)
        assert block is not None, name
        assert block[1] == (EXAMPLE / name).read_text(encoding="utf-8")
