"""The house's rules: imports run downwards and never in a circle, a name means one class, the page tells the truth."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = {
    "vpdeploy": ROOT / "vpdeploy",
    "vpdeploy_train": ROOT / "train" / "vpdeploy_train",
    "vpdeploy_export": ROOT / "export" / "vpdeploy_export",
    "benchmarks": ROOT / "benchmarks",
    "tools": ROOT / "tools",
}


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts))), path


def imports_of(path: Path, names: set[str]) -> set[str]:
    """Return the modules that a file imports at its top, those for types alone left out."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {each if each in names else node.module for each in submodules}
    return found & names


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    files = dict(modules())
    return {name: imports_of(path, set(files)) - {name} for name, path in files.items()}


def circle_in(graph: Mapping[str, set[str]]) -> list[str]:
    """Return the nodes of a circle, or nothing: nodes that lead nowhere are taken away until none is left to take."""
    left = {name: set(targets) for name, targets in graph.items()}
    while leaves := {name for name, targets in left.items() if not targets & left.keys()}:
        left = {name: targets for name, targets in left.items() if name not in leaves}
    return sorted(left)


def test_no_module_is_imported_in_a_circle(imports: dict[str, set[str]]) -> None:
    assert circle_in(imports) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_two_rooms_of_a_package_need_each_other(package: str, imports: dict[str, set[str]]) -> None:
    def room(module: str) -> str:
        return module.split(".")[1]

    rooms: dict[str, set[str]] = defaultdict(set)
    for module, targets in imports.items():
        if module.startswith(f"{package}."):
            inside = {room(target) for target in targets if target.startswith(f"{package}.")}
            rooms[room(module)] |= inside - {room(module)}

    assert circle_in(rooms) == []


def test_a_circle_would_be_found() -> None:
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["a", "b", "c", "d"]


def test_no_two_public_classes_have_one_name() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for module, path in modules():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(module)

    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


def test_the_page_names_files_that_exist() -> None:
    named = re.findall(r"`([a-z_/]+(?:\.py|/))`", PAGE.read_text(encoding="utf-8"))
    inside_export = ROOT / "export" / "vpdeploy_export"
    inside_train = ROOT / "train" / "vpdeploy_train"

    missing = [
        name for name in named if not any((base / name).exists() for base in (ROOT, inside_export, inside_train))
    ]

    assert len(named) > 20
    assert missing == []


def test_the_pictures_name_modules_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="needs the train extra")
    monkeypatch.syspath_prepend(str(ROOT))
    from tools.architecture import PICTURES

    known = {name for name, _ in modules()}
    named = {module for picture in PICTURES for box in picture.boxes.values() for module in box.modules}

    assert len(named) > 20
    assert named - known == set()


def test_the_pictures_arrows_join_their_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="needs the train extra")
    monkeypatch.syspath_prepend(str(ROOT))
    from tools.architecture import PICTURES

    ends = {(picture.name, end) for picture in PICTURES for start, stop, _ in picture.arrows for end in (start, stop)}

    assert ends == {(picture.name, box) for picture in PICTURES for box in picture.boxes}
