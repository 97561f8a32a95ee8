"""What each package shows to users: every name in ``__all__`` is explained, and every example runs as it stands.

A package joins with a line in ``PACKAGES``, a page with one in ``PAGES``.
"""

from __future__ import annotations

import doctest
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "vpdeploy": ("zoo", "rose"),
    "vpdeploy_train": ("photos", "run", "pruned", "checkpoint"),
    "vpdeploy_export": ("bundle", "flowers_run", "birds_run"),
}
"""The packages, and the names that their examples are given: fixtures of this file, or of all tests."""

PAGES = {"docs/python.md": ("zoo", "rose", "photos", "checkpoint", "flowers_run", "birds_run")}
"""The pages with examples, and the names that these are given."""

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def public_objects(package: str) -> dict[str, Any]:
    """Classes, functions and modules in a package's ``__all__``, by name."""
    module = import_module(package)
    found = {name: getattr(module, name) for name in module.__all__}
    return {name: each for name, each in found.items() if callable(each) or inspect.ismodule(each)}


NAMES = [(package, name) for package in PACKAGES for name in import_module(package).__all__ if name != "__version__"]


@pytest.fixture
def rose(tmp_path: Path) -> Path:
    """A picture."""
    pillow = pytest.importorskip("PIL.Image", reason="needs Pillow")
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    pillow.fromarray(pixels).save(tmp_path / "rose.png")
    return tmp_path / "rose.png"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of 42 labelled pictures, of three classes."""
    pytest.importorskip("timm", reason="needs the train extra")
    from train.toys import write_colours

    return str(write_colours(tmp_path_factory.mktemp("photos")))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, photos: str) -> dict[str, Path]:
    """Two runs on the photos: ``run``, and ``pruned``, whose prompts were pruned."""
    from vpdeploy_train import TrainSettings, train_run

    folder = tmp_path_factory.mktemp("trained")
    settings = TrainSettings.of(data=photos, method="vpt-deep", prompt_tokens=2, epochs=1, device="cpu")
    train_run(settings.changed(prune=False), folder / "run", name="photos")
    train_run(settings.changed(prune=True, keep="0.5"), folder / "pruned", name="photos")
    return {name: folder / name for name in ("run", "pruned")}


@pytest.fixture
def run(trained: dict[str, Path]) -> Path:
    return trained["run"]


@pytest.fixture
def pruned(trained: dict[str, Path]) -> Path:
    return trained["pruned"]


@pytest.fixture
def checkpoint() -> Path:
    """A file of the public VPT code."""
    from parity_files import path_of

    return path_of("vpt_deep_toy")


@pytest.fixture
def bundle(zoo_copy: Path) -> Path:
    """A bundle that an example may change."""
    return zoo_copy


@pytest.fixture
def flowers_run(tiny_run_paths: dict[str, Path], shared_traces: Path) -> Path:
    """A run whose export need not be traced again."""
    return tiny_run_paths["flowers"]


@pytest.fixture
def birds_run(tiny_run_paths: dict[str, Path], shared_traces: Path) -> Path:
    return tiny_run_paths["birds"]


Give = Callable[[Sequence[str]], dict[str, Any]]


@pytest.fixture
def give(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Give:
    """Return what examples find under the names given, in a folder that they may write to."""
    monkeypatch.chdir(tmp_path)

    def call(names: Sequence[str]) -> dict[str, Any]:
        packages = {package: import_module(package) for package in PACKAGES}
        return {**packages, "Path": Path, **{name: request.getfixturevalue(name) for name in names}}

    return call


def members_of(owner: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that a class defines itself: functions, those of class methods among them."""
    for name, member in vars(owner).items():
        if not name.startswith("_"):
            yield name, member.__func__ if isinstance(member, (classmethod, staticmethod)) else member


def parameters_of(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


def missing_of_function(name: str, function: Any) -> list[str]:
    """What a function's docstring does not say."""
    text = inspect.getdoc(function)
    if not text:
        return [f"{name}: a docstring"]
    missing = [f"{name}: Args: {each}" for each in parameters_of(function) if not re.search(rf"\n +\**{each}: ", text)]
    annotation = inspect.signature(function).return_annotation
    answers = annotation not in (None, "None", inspect.Signature.empty)
    # The first line may say it all.
    if answers and "Returns:" not in text and not text.startswith(("Return ", "Tell ")):
        missing.append(f"{name}: Returns")
    raises = re.search(r"^\s+raise \w+Error\b", inspect.getsource(function), re.MULTILINE)
    if raises and "Raises:" not in text:
        missing.append(f"{name}: Raises")
    return missing


def missing_of_class(name: str, owner: type) -> list[str]:
    """What the docstrings of a class and of its members do not say."""
    text = inspect.getdoc(owner) if "__doc__" in vars(owner) else None
    if not text:
        return [f"{name}: a docstring"]
    missing = []
    if "__init__" in vars(owner):
        # An option says what it is for where it is declared.
        helped = {each.name for each in fields(owner) if "help" in each.metadata} if is_dataclass(owner) else set()
        missing = [
            f"{name}: Args or Attributes: {each}"
            for each in parameters_of(owner.__init__)
            if each not in helped and not re.search(rf"\n +\**{each}: ", text)
        ]
    for member_name, member in members_of(owner):
        full = f"{name}.{member_name}"
        if inspect.isfunction(member):
            missing += missing_of_function(full, member)
        elif isinstance(member, property) and not inspect.getdoc(member.fget):
            missing.append(f"{full}: a docstring")
    return missing


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_a_public_name_is_explained(package: str, name: str):
    each = public_objects(package)[name]
    if inspect.ismodule(each):
        missing = [] if inspect.getdoc(each) else [f"{name}: a docstring"]
    else:
        missing = missing_of_class(name, each) if inspect.isclass(each) else missing_of_function(name, each)
    assert missing == []


def examples_of(package: str, name: str) -> list[doctest.DocTest]:
    """The examples in the docstrings of a public name and of its members."""
    each = public_objects(package)[name]
    found = doctest.DocTestFinder(recurse=inspect.isclass(each)).find(each, f"{package}.{name}", globs={})
    return [test for test in found if test.examples]


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_a_public_name_has_an_example(package: str, name: str):
    each = public_objects(package)[name]
    if inspect.isclass(each) and issubclass(each, Exception):
        # How to catch one is how to catch another: the module of the errors shows it.
        package, name = "vpdeploy", "errors"
    assert examples_of(package, name)


def run_example(example: doctest.DocTest, given: dict[str, Any]) -> None:
    example.globs = dict(given)
    report: list[str] = []
    doctest.DocTestRunner(optionflags=OPTIONS).run(example, out=report.append)
    assert report == [], "".join(report)


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_an_example_runs_as_it_stands(package: str, name: str, give: Give):
    for example in examples_of(package, name):
        run_example(example, give(PACKAGES[package]))


@pytest.mark.parametrize("package", PACKAGES)
def test_the_example_of_a_package_runs_as_it_stands(package: str, give: Give):
    text = inspect.getdoc(import_module(package)) or ""
    example = doctest.DocTestParser().get_doctest(text, {}, package, None, None)
    assert example.examples
    run_example(example, give(PACKAGES[package]))


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_a_page_run_as_they_stand(page: str, give: Give):
    # A fence would be taken for what the line before it prints.
    text = re.sub(r"^```.*$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    example = doctest.DocTestParser().get_doctest(text, {}, page, page, 0)
    assert example.examples
    run_example(example, give(PAGES[page]))


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_listed_in_order_and_exist(package: str):
    module = import_module(package)
    assert list(module.__all__) == sorted(set(module.__all__))
    assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        _ = module.nothing
