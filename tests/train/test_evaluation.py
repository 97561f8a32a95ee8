"""What an evaluation tells of classes, in words, JSON and pictures, and what it refuses before it reads images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from train.toys import TOY
from typer.testing import CliRunner

import vpdeploy_train.evaluation_pictures as pictures
from vpdeploy.cli.main import build_app
from vpdeploy.errors import SpecError
from vpdeploy_train.evaluation import MOST_CONFUSED, MOST_DENSE_CLASSES, Evaluation, RunEvaluation, evaluate_run
from vpdeploy_train.run import Run
from vpdeploy_train.settings import TrainSettings
from vpdeploy_train.training import train_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, colours: Path, toy_weights: Path) -> Run:
    settings = TrainSettings.of(
        data=str(colours),
        backbone=TOY,
        weights=str(toy_weights),
        method="linear",
        head="zero",
        epochs=1,
        batch_size=8,
        device="cpu",
    )
    return train_run(settings, tmp_path_factory.mktemp("runs") / "run").run


def evaluated(run: Run, names: list[str], labels: Any, predicted: Any) -> RunEvaluation:
    """An evaluation of so many classes, with given answers."""
    evaluation = Evaluation(
        loss=0.5, classes=len(names), labels=np.asarray(labels, np.int64), predicted=np.asarray(predicted, np.int64)
    )
    return RunEvaluation(
        run=replace(run, card=replace(run.card, labels=tuple(names))), split="test", evaluation=evaluation
    )


def random_answers(classes: int, images: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, images)
    return labels, np.where(rng.random(images) < 0.7, labels, rng.integers(0, classes, images))


LABELS, PREDICTED = [0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 0, 2]


def test_the_json_form_has_every_class_and_every_pair_that_is_confused(run):
    found = evaluated(run, ["a", "b", "c", "d"], LABELS, PREDICTED).to_json()
    assert found["per_class"] == [
        {"label": "a", "images": 3, "accuracy": 1 / 3},
        {"label": "b", "images": 2, "accuracy": 1 / 2},
        {"label": "c", "images": 1, "accuracy": 1.0},
        {"label": "d", "images": 0, "accuracy": None},
    ]
    assert found["confused"] == [
        {"true": "a", "predicted": "b", "images": 2},
        {"true": "b", "predicted": "a", "images": 1},
    ]
    assert found["confusion"] == [[1, 2, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


def test_the_matrix_of_very_many_classes_is_left_out_of_the_json_form(run):
    most = [f"c{number}" for number in range(MOST_DENSE_CLASSES)]
    assert len(evaluated(run, most, LABELS, PREDICTED).to_json()["confusion"]) == len(most)
    found = evaluated(run, [*most, "one more"], LABELS, PREDICTED).to_json()
    assert found["confusion"] is None
    assert len(found["per_class"]) == len(most) + 1


def test_the_confused_pairs_are_bounded_and_the_most_frequent_stay(run):
    classes = MOST_CONFUSED + 50
    labels = [*range(classes), 3, 3]
    predicted = [(label + 1) % classes for label in labels]
    found = evaluated(run, [str(number) for number in range(classes)], labels, predicted).to_json()["confused"]
    assert len(found) == MOST_CONFUSED
    assert found[0] == {"true": "3", "predicted": "4", "images": 3}


def test_confused_pairs_of_very_many_classes_take_no_square_of_memory():
    labels, predicted = np.array([0, 7, 99_999]), np.array([0, 3, 5])  # a matrix of counts would take 80 GB
    found = Evaluation(loss=0.0, classes=100_000, labels=labels, predicted=predicted).confused(9)
    assert [(pair.true, pair.predicted, pair.images) for pair in found] == [(7, 3, 1), (99_999, 5, 1)]


def test_the_worst_classes_and_what_they_are_taken_for_are_told_in_words(run):
    lines = evaluated(run, ["a\nx", "b" * 50, "c", "d"], LABELS, PREDICTED).to_text().splitlines()
    assert lines[0].endswith("6 images of split 'test'")
    assert lines[1] == "accuracy 0.5000, mean over classes 0.6111, loss 0.5000"  # of 1/3, 1/2 and 1
    long = "b" * 39 + "…"
    assert lines[2:] == [
        "worst classes:",
        "  1 of 3 right  a x",
        f"  1 of 2 right  {long}",
        "most confused:",
        f"  2 of 3  a x -> {long}",
        f"  1 of 2  {long} -> a x",
    ]


def test_nothing_is_said_of_mistakes_where_there_are_none(run):
    assert len(evaluated(run, ["a", "b"], [0, 1], [0, 1]).to_text().splitlines()) == 2


@pytest.mark.parametrize("classes", [2, 6, 50, 51, 3_000])
def test_the_names_in_the_pictures_cover_each_other_in_none(run, tmp_path, monkeypatch, classes):
    figures: list[Figure] = []
    monkeypatch.setattr(pictures, "save_picture", lambda figure, path: figures.append(figure))
    names = [f"class {number} of many that have long names" for number in range(classes)]
    pictures.plot_evaluation(evaluated(run, names, *random_answers(classes, 5 * classes)), tmp_path)
    for figure in figures:
        figure.draw_without_rendering()
        for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
            boxes = [label.get_window_extent() for label in axis.get_ticklabels() if "class" in label.get_text()]
            overlaps = [one.overlaps(other) for at, one in enumerate(boxes) for other in boxes[at + 1 :]]
            assert not any(overlaps)
            assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 for box in boxes)
    matrix = [label.get_text() for label in figures[0].axes[0].get_yticklabels()]
    assert len(matrix) == (classes if classes <= 50 else 30)
    assert all(": class " in name for name in matrix)


def test_names_that_the_font_lacks_or_that_look_like_formulas_are_drawn_without_a_warning(run, tmp_path):
    names = ["猫", "🌹 rose", "$x", "a$b$c", "\x07", "x" * 200, "ünï", " "]
    found = evaluated(run, names, *random_answers(len(names), 80))
    for path in pictures.plot_evaluation(found, tmp_path / "a" / "new folder"):
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 10


@pytest.mark.parametrize("classes", [3, 60])
@pytest.mark.parametrize("images", [0, 3])
def test_pictures_without_a_mistake_or_without_an_image_can_be_drawn(run, tmp_path, classes, images):
    right = np.arange(images)
    pictures.plot_evaluation(evaluated(run, [str(name) for name in range(classes)], right, right), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classes.png", "confusion.png"]


def test_pictures_are_written_where_they_are_asked_for_and_nowhere_else(run, tmp_path):
    before = sorted(run.path.rglob("*"))
    plain = CliRunner().invoke(build_app(["eval"]), ["eval", str(run.path)])
    plotted = CliRunner().invoke(
        build_app(["eval"]), ["eval", str(run.path), "--json", "--plots", str(tmp_path / "plots")]
    )
    assert (plain.exit_code, plotted.exit_code) == (0, 0)
    assert "accuracy" in plain.stdout
    assert sorted(run.path.rglob("*")) == before
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["classes.png", "confusion.png"]
    assert len(json.loads(plotted.stdout)["per_class"]) == 3


def test_a_model_that_cannot_be_had_is_refused_before_images_are_read(run, tmp_path, decoded):
    with pytest.raises(SpecError, match="missing"):
        evaluate_run(run, weights=tmp_path / "missing.safetensors")
    assert decoded == []


def test_an_evaluation_that_keeps_no_image_in_memory_gives_the_same_figures(run):
    kept, not_kept = evaluate_run(run, cache_bytes=None), evaluate_run(run, cache_bytes=0)
    assert kept.to_json() == not_kept.to_json()
