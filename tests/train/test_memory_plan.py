"""What a training says that it will take of the memory, what it refuses, and what the image cache is bounded by."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from train.toys import TOY
from typer.testing import CliRunner

from vpdeploy.cli.main import build_app
from vpdeploy.cli.sizes import parse_size
from vpdeploy.errors import SpecError
from vpdeploy_train.inputs import load_inputs
from vpdeploy_train.memory_plan import MemoryPlan, Workload
from vpdeploy_train.settings import TrainSettings
from vpdeploy_train.training import train_run

GIB = 1 << 30

# ViT-B/16 at 224 px, 10 prompts a block: 12 blocks of 196 patches of width 768.
WORK = Workload(
    images=200_000,
    classes=10_000,
    width=768,
    batch_size=64,
    cells=12 * 196 * 768,
    parameters=12 * 10 * 768,
    candidates=0,
    head_is_probed=True,
    computes_here=True,
    decoded_bytes=200_000 * 224 * 224 * 3,
    threads=2,
    workers=0,
)


def plan_of(free_bytes: int = 100 * GIB, cache_bytes: int | None = None, **changes: Any) -> MemoryPlan:
    return MemoryPlan.of(replace(WORK, **changes), cache_bytes=cache_bytes, free_bytes=free_bytes)


@pytest.fixture
def settings(colours: Path, toy_weights: Path) -> TrainSettings:
    return TrainSettings.of(
        data=str(colours),
        backbone=TOY,
        weights=str(toy_weights),
        method="vpt-deep",
        prompt_tokens=2,
        prune=False,
        epochs=1,
        batch_size=8,
        device="cpu",
    )


def test_ten_times_the_classes_or_the_images_take_ten_times_the_memory_at_most():
    once = plan_of()
    classes, images = plan_of(classes=100_000), plan_of(images=2_000_000)
    for part in ("trained_bytes", "probe_bytes", "step_bytes", "rest_bytes"):
        assert getattr(classes, part) <= 10 * getattr(once, part)
        assert getattr(images, part) <= 10 * getattr(once, part)


def test_no_part_has_the_product_of_images_and_classes_but_the_small_probe():
    plan = plan_of()
    assert plan.trained_bytes + plan.probe_bytes + plan.rest_bytes < 200_000 * 10_000 * 4
    # 1,000 images of 100 classes: logistic regression, in float64.
    assert plan_of(images=1_000, classes=100).probe_bytes >= 1_000 * 100 * 8


def test_the_head_counts_with_its_gradient_the_optimizers_tensors_and_copies():
    assert plan_of().trained_bytes >= 4 * (1 + 1 + 2) * 10_000 * 768
    assert plan_of(candidates=6).trained_bytes > 2 * plan_of().trained_bytes


def test_a_gpus_steps_take_nothing_of_this_machine():
    assert plan_of(computes_here=False).step_bytes == 0


def test_a_head_alone_holds_no_activations_for_a_backward_pass():
    assert plan_of(parameters=0).step_bytes < plan_of().step_bytes / 2


def test_images_may_take_half_of_what_the_rest_leaves_free():
    plan = plan_of(free_bytes=20 * GIB)
    others = plan.total_bytes - plan.images_bytes
    assert plan.images_bytes == plan.cache_bytes == (20 * GIB - others) // 2
    assert plan_of(cache_bytes=GIB).images_bytes == GIB
    assert plan_of(cache_bytes=1000 * GIB).images_bytes == WORK.decoded_bytes


def test_the_line_names_every_part_and_what_is_free():
    text = plan_of(free_bytes=20 * GIB, workers=4).describe()
    assert text.count("\n") == 0
    for part in ("images", "of 28.0 GiB", "by 4 processes", "optimizer", "probe", "a step", "20.0 GiB that are free"):
        assert part in text


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"batch_size": 6_400}, "--batch-size"),
        ({"cache_bytes": 200 * GIB, "decoded_bytes": 300 * GIB}, "--cache"),
        ({"classes": 2_000_000}, "classes"),
        ({"images": 20_000_000, "width": 1_024}, "--head zero"),
        ({"workers": 400}, "--workers"),
    ],
)
def test_what_clearly_does_not_fit_is_refused_with_what_to_lower(changes, advice):
    with pytest.raises(SpecError, match=f"about .* GiB of memory, 100.0 GiB are free .*: .*{advice}") as refusal:
        plan_of(**changes).require_room()
    assert "\n" not in str(refusal.value)


def test_what_fits_is_not_refused():
    plan_of().require_room()


def test_memory_is_told_before_images_are_read(settings, decoded, caplog):
    told: list[tuple[str, int]] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append((record.getMessage(), len(decoded)))

    handler = Handler()
    logging.getLogger("vpdeploy.train").addHandler(handler)
    try:
        with caplog.at_level(logging.INFO, logger="vpdeploy.train"):
            load_inputs(settings)
    finally:
        logging.getLogger("vpdeploy.train").removeHandler(handler)
    assert [count for text, count in told if text.startswith("memory: ")] == [0]
    assert decoded


def test_a_training_that_cannot_fit_is_refused_before_images_are_read(settings, tmp_path, decoded, monkeypatch):
    monkeypatch.setattr("vpdeploy_train.memory_plan.free_memory", lambda: 1 << 20)
    with pytest.raises(SpecError, match="1 MiB are free"):
        train_run(settings, tmp_path / "run")
    assert decoded == []
    assert not (tmp_path / "run").exists()


def test_the_cache_is_bounded_and_changes_no_result(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("vpdeploy_train.training.plot_curves", lambda _, path: path.touch())
    monkeypatch.setattr("vpdeploy_train.data.loader.default_workers", lambda: 0)
    inputs = load_inputs(settings, cache_bytes=4_000)
    assert inputs.train.budget is inputs.val.budget
    assert 0 < inputs.train.budget.kept_bytes <= 4_000
    for name, cache_bytes in (("all", None), ("none", 0)):
        train_run(settings, tmp_path / name, name="task", cache_bytes=cache_bytes)
    files = [tmp_path / name / "prompts.safetensors" for name in ("all", "none")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_resume_may_take_another_cache(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("vpdeploy_train.training.plot_curves", lambda _, path: path.touch())
    train_run(settings, tmp_path / "run", cache_bytes=0)
    assert "cache" not in (tmp_path / "run" / "args.toml").read_text()
    train_run(settings, tmp_path / "run", resume=True, cache_bytes=GIB)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("2GiB", 2 * GIB),
        ("2G", 2 * GIB),
        ("2 gib", 2 * GIB),
        ("1.5GiB", 3 * GIB // 2),
        ("2GB", 2 * 10**9),
        ("500MiB", 500 << 20),
        ("8kB", 8_000),
    ],
)
def test_a_size_is_a_number_and_a_unit(text, size_bytes):
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("verb", ["train", "eval", "sweep"])
@pytest.mark.parametrize("text", ["5", "-1GiB", "much", "", "50%"])
def test_what_is_no_size_is_a_usage_error(verb, text, tmp_path):
    given = [str(tmp_path)] if verb == "eval" else ["--out", str(tmp_path / "out")]
    result = CliRunner().invoke(build_app([verb]), [verb, *given, f"--cache={text}"])
    assert result.exit_code == 2
    assert "expected such as 2GiB, 500MiB or 0" in " ".join(result.output.split())
