from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("timm", reason="needs the train extra")

import tiny_runs
import torch
from PIL import Image

from benchmarks.accuracy import run
from benchmarks.accuracy.table import RESULT_FILE, read_rows
from benchmarks.accuracy.trainer import Trainer, cpu_attention
from vpdeploy_train.config import read_toml
from vpdeploy_train.footprint import count_macs
from vpdeploy_train.run import Run
from vpdeploy_train.settings import TrainSettings
from vpdeploy_train.training import train_run


@pytest.fixture
def options(tmp_path: Path, tiny_weights: Path) -> argparse.Namespace:
    """One task of three colours, and a run of everything over it."""
    noise = np.random.default_rng(7)
    for split, count in (("train", 8), ("val", 4), ("test", 4)):
        for label, colour in {"blue": (40, 60, 200), "green": (50, 190, 70), "red": (200, 50, 60)}.items():
            folder = tmp_path / "data" / "fashion" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.array(colour) + noise.integers(-40, 40, (16, 16, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    summary = {"images": {"train": 24, "val": 12, "test": 12}, "sha256": hashlib.sha256(b"colours").hexdigest()}
    (tmp_path / "data" / "fashion.json").write_text(json.dumps(summary))
    return argparse.Namespace(
        preset="cpu",
        data=tmp_path / "data",
        out=tmp_path / "out",
        backbone=tiny_runs.NAME,
        weights=tiny_weights,
        image_size=tiny_runs.SIDE,
        tasks=["fashion"],
        configurations=["linear", "e2vpt-pruned"],
        seeds=[3],
        epochs=1,
        batch_size=8,
        keep="0.5,0.2",
        trials=2,
        precision="fp32",
        device="cpu",
        threads=None,
    )


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_finished_rows_are_kept_and_pruning_goes_on_from_the_unpruned_run(
    options: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert run.main(options) == 0
    written = (options.out / RESULT_FILE).read_bytes()
    rows = {row.configuration: row for row in read_rows(options.out / RESULT_FILE)}
    assert list(rows) == ["linear", "e2vpt", "e2vpt-pruned"]
    assert rows["linear"].prompt_parameters == 0
    # L (T + T_KV) D = 3 · 15 · 48
    assert rows["e2vpt"].prompt_parameters == 2160
    assert rows["e2vpt-pruned"].rate == rows["e2vpt"].rate

    monkeypatch.setattr(Trainer, "finish", lambda *_: pytest.fail("a finished row was made again"))
    assert run.main(options) == 0
    assert (options.out / RESULT_FILE).read_bytes() == written

    continued = options.out / "runs" / "fashion" / "e2vpt-pruned" / f"rate-{rows['e2vpt'].rate:g}" / "seed-3"
    at_once = tmp_path / "at-once"
    with cpu_attention(torch.device("cpu")):
        train_run(TrainSettings.merge(read_toml(continued / "args.toml")), at_once)
    for name in ("prompts.safetensors", "pruning.json"):
        assert (at_once / name).read_bytes() == (continued / name).read_bytes()


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_result_file_of_other_settings_is_not_continued(
    options: argparse.Namespace, capsys: pytest.CaptureFixture[str]
):
    options.configurations = ["linear"]
    assert run.main(options) == 0
    options.epochs = 2
    assert run.main(options) == 1
    assert "epochs was 1, now 2; give another --out" in capsys.readouterr().err


def test_macs_are_those_of_one_image_of_the_deployed_model(tiny_run_paths: dict[str, Path], tiny_weights: Path):
    path = tiny_run_paths["birds"]  # 10 prompts in each of 3 blocks, 7 classes
    model = Run.read(path).load_model(tiny_runs.backbone_of(tiny_weights))
    rows, width, prompts = tiny_runs.TOKENS, tiny_runs.WIDTH, 10
    full_block = (4 + 2 * 2) * rows * width**2 + 2 * rows * (rows + prompts) * width
    last_block = (2 * rows + 2 + 2 * 2) * width**2 + 2 * (rows + prompts) * width
    patches = tiny_runs.PATCHES * 3 * tiny_runs.PATCH**2 * width
    assert count_macs(model) == patches + 2 * full_block + last_block + 7 * width
