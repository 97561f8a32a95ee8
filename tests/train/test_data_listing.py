"""What is told while the files of a data set are listed."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from PIL import Image

from vpdeploy_train.data import resolve_data
from vpdeploy_train.data.listing import listed, listening
from vpdeploy_train.data.resolve import ProgressBar


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int | None]]:
    """What the progress bar is told."""
    told: list[tuple[int, int | None]] = []
    monkeypatch.setattr(ProgressBar, "count", lambda self, done, total=None: told.append((done, total)))
    return told


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "images" / name / f"{number}.png" for name in ("a", "b") for number in range(4)]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    return paths


def test_the_files_of_all_class_folders_are_counted_together(files, told):
    resolve_data(str(files[0].parent.parent), seed=0)
    assert told == [(done, None) for done in range(1, 9)]


def test_a_manifests_rows_are_counted_and_its_files_shown_as_a_share(files, told):
    manifest = files[0].parent.parent / "all.csv"
    lines = [f"{path.relative_to(manifest.parent)},{path.parent.name}" for path in files]
    manifest.write_text("\n".join(["path,label", *lines]))
    resolve_data(str(manifest), seed=0)
    assert told == [(done, None) for done in range(1, 9)] + [(done, 8) for done in range(1, 9)]


def test_nobody_need_listen():
    assert list(listed(iter("abc"))) == ["a", "b", "c"]


def test_listening_ends_with_its_context():
    told: list[int] = []
    with listening(lambda done, total: told.append(done)):
        list(listed("ab"))
        list(listed("cd"))
    list(listed("ef"))
    assert told == [1, 2, 3, 4]


def test_files_are_not_taken_ahead():
    taken = itertools.count()
    next(listed(taken))
    assert next(taken) == 1
