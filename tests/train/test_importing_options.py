"""Labels and preprocessing of imported runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from train.imports import (
    assert_refused,
    changed,
    importing,
)

from vpdeploy.errors import SpecError
from vpdeploy_train.importing.labels import read_labels
from vpdeploy_train.importing.pipeline import Pipeline


@pytest.mark.parametrize(
    ("file", "text"),
    [("labels.txt", "cat\ndog \nkrähe\n\n"), ("labels.txt", "\ufeffcat\r\ndog\r\nkrähe"), ("labels.json", "")],
)
def test_labels_are_one_a_line_or_a_json_list(tmp_path: Path, file: str, text: str):
    path = tmp_path / file
    path.write_text(text or json.dumps(["cat", "dog", "krähe"]), encoding="utf-8")
    assert read_labels(path) == ("cat", "dog", "krähe")


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("labels.txt", b"", "it is empty"),
        ("labels.txt", b"a\n\nb", "line 2 is empty"),
        ("labels.txt", b"a\nb\na", "'a' is given twice"),
        ("labels.txt", b"\xff\xfe", "not UTF-8"),
        ("labels.json", b"{}", "expected a JSON list"),
        ("labels.json", b"[1]", "expected a JSON list"),
        ("labels.json", b"[", "not valid JSON"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(tmp_path: Path, file: str, content: bytes, match: str):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(SpecError, match=match):
        read_labels(tmp_path / file)


def test_labels_have_to_match_the_head_and_default_to_numbers(tmp_path: Path):
    path = changed(tmp_path, "vpt_deep_toy", lambda state: None)
    assert_refused(path, "2 class names, but 'head.last_layer.weight' of .* has 7 classes", labels=["a", "b"])
    assert importing(path, tmp_path / "out").card.labels == ("0", "1", "2", "3", "4", "5", "6")


def test_images_are_prepared_as_the_public_code_does_unless_told_otherwise():
    default = Pipeline().preprocessing(224)
    assert (default.resize, default.image_size / default.crop_ratio, default.interpolation) == ("crop", 256, "bilinear")
    assert (default.mean, default.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    squashed = Pipeline(resize="squash", mean=(0.5, 0.5, 0.5)).preprocessing(224)
    assert (squashed.resize, squashed.crop_ratio, squashed.mean) == ("squash", 1.0, (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    "options",
    [
        {"resize": "stretch"},
        {"interpolation": "nearest"},
        {"crop_ratio": 0.0},
        {"crop_ratio": float("nan")},
        {"resize": "squash", "crop_ratio": 0.9},
        {"mean": (0.5, 0.5, float("inf"))},
        {"std": (0.5, 0.0, 0.5)},
    ],
    ids=str,
)
def test_preprocessing_that_cannot_be_is_refused(options: dict[str, Any]):
    with pytest.raises(SpecError, match=f"^--{list(options)[-1].replace('_', '-')}"):
        Pipeline(**options)
