"""What ``vpdeploy_train`` shows to users: every name in ``__all__`` is explained, and every example runs as it stands.

Examples are given ``photos``, a folder of 42 labelled pictures; ``run``, a run trained on them; ``pruned``, one whose
prompts were pruned; and ``checkpoint``, a file of the public VPT code. They may write to the folder that they run in.
"""

from __future__ import annotations

import doctest
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from parity_files import path_of

import vpdeploy_train
from vpdeploy_train.settings import TrainSettings
from vpdeploy_train.training import train_run

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, colours: Path) -> dict[str, Path]:
    """A run of visual prompts by name: ``run``, and ``pruned``."""
    folder = tmp_path_factory.mktemp("runs")
    settings = TrainSettings.of(data=str(colours), method="vpt-deep", prompt_tokens=2, epochs=1, device="cpu")
    train_run(settings.changed(prune=False), folder / "run", name="photos")
    train_run(settings.changed(prune=True, keep="0.5"), folder / "pruned", name="photos")
    return {name: folder / name for name in ("run", "pruned")}


@pytest.fixture
def given(runs: dict[str, Path], colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    others = {"Path": Path, "photos": str(colours), "checkpoint": path_of("vpt_deep_toy")}
    return {"vpdeploy_train": vpdeploy_train, **others, **runs}


def run_example(example: doctest.DocTest, given: dict[str, Any]) -> None:
    example.globs = dict(given)
    report: list[str] = []
    doctest.DocTestRunner(optionflags=OPTIONS).run(example, out=report.append)
    assert example.examples
    assert report == [], "".join(report)


def parsed(text: str, name: str) -> doctest.DocTest:
    return doctest.DocTestParser().get_doctest(text, {}, name, None, None)


@pytest.mark.parametrize("name", vpdeploy_train.__all__)
def test_the_example_of_a_public_name_runs_as_it_stands(name: str, given: dict[str, Any]):
    run_example(parsed(inspect.getdoc(getattr(vpdeploy_train, name)) or "", name), given)


def test_the_example_of_the_package_runs_as_it_stands(given: dict[str, Any]):
    run_example(parsed(vpdeploy_train.__doc__ or "", "vpdeploy_train"), given)


def functions_of(owner: Any) -> Iterator[Any]:
    """A public function itself; of a class, the public methods and properties that it defines."""
    if inspect.isfunction(owner):
        yield owner
        return
    for name, member in vars(owner).items():
        if not name.startswith("_"):
            found = getattr(member, "fget", None) or getattr(member, "__func__", member)
            if inspect.isfunction(found):
                yield found


def parameters_of(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


@pytest.mark.parametrize("name", vpdeploy_train.__all__)
def test_a_public_name_and_its_parameters_are_explained(name: str):
    owner = getattr(vpdeploy_train, name)
    text = inspect.getdoc(owner) or ""
    assert text
    if owner is TrainSettings:  # each field carries its own help
        return
    for function in functions_of(owner):
        found = inspect.getdoc(function) or ""
        missing = [each for each in parameters_of(function) if not re.search(rf"\n +{each}: ", found)]
        assert found
        assert not missing, f"{function.__qualname__}: {missing}"
    if inspect.isclass(owner):
        assert [each for each in parameters_of(owner) if not re.search(rf"\n +{each}: ", text)] == []


def test_public_names_are_listed_in_order_and_exist():
    assert vpdeploy_train.__all__ == sorted(set(vpdeploy_train.__all__))
    assert set(vpdeploy_train.__all__) <= set(dir(vpdeploy_train))
    with pytest.raises(AttributeError, match="has no attribute 'retrain'"):
        vpdeploy_train.retrain  # noqa: B018 (reading it is the test)


def test_importing_the_package_loads_neither_torch_nor_timm():
    code = "import sys, vpdeploy_train; print(sorted({'torch', 'timm', 'numpy'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
