"""The command line: ``python -m tools.embedded_backbone --help``."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tools import embedded_backbone
from tools.embedded_backbone.distillation import Schedule, describe, distil
from tools.embedded_backbone.evaluation import evaluate
from tools.embedded_backbone.features import keep_features
from tools.embedded_backbone.packages import Folders
from tools.embedded_backbone.student import read_weights, write_weights
from tools.embedded_backbone.views import CHUNK
from vpdeploy_train.embedded import WEIGHTS


def main() -> None:
    """Run the stages in order."""
    folders, schedule, out = read_arguments()
    folders.work.mkdir(parents=True, exist_ok=True)
    name = describe(schedule)
    record = folders.work / f"seconds-{name}.json"
    with time_stage(record, "features"):
        features = keep_features(folders, schedule.views, schedule.seed)
    with time_stage(record, "distil"):
        student = distil(features, folders.work, schedule)
    write_weights(student, out)
    with time_stage(record, "evaluate"):
        table = evaluate(folders, read_weights(out), schedule.seed)
    (folders.work / f"quality-{name}.json").write_text(json.dumps(table, indent=2))


def read_arguments() -> tuple[Folders, Schedule, Path]:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.embedded_backbone",
        description=embedded_backbone.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for caches and results")
    parser.add_argument("--python", type=Path, required=True, help="target folder of pip install --no-deps")
    parser.add_argument("--emoji", type=Path, required=True, help="node_modules folder with the emoji packages")
    parser.add_argument("--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--clipart", type=Path, default=Path("/usr/share/openclipart/png"))
    parser.add_argument("--photos", type=Path, required=True, help="scikit-image's data folder")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="the weights file to write")
    parser.add_argument("--views", type=int, default=32768, help="distinct views, a multiple of 2048")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--cool-down", type=int, default=2, help="how many of the epochs end the training")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--peak-rate", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    if given.views % CHUNK:
        parser.error(f"--views: expected a multiple of {CHUNK}, found {given.views}")
    torch.set_num_threads(given.threads)
    folders = Folders(**choose(given, ("python", "emoji", "fashion", "clipart", "photos", "work")))
    numbers = ("views", "epochs", "cool_down", "batch", "peak_rate", "decay", "seed")
    return folders, Schedule(**choose(given, numbers)), given.out


def choose(given: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the named arguments."""
    return {name: getattr(given, name) for name in names}


@contextmanager
def time_stage(record: Path, stage: str) -> Iterator[None]:
    """Add the seconds of a stage to the record, so that an interrupted run still sums up right."""
    begin = time.monotonic()
    yield
    kept = json.loads(record.read_text()) if record.exists() else {}
    kept[stage] = round(kept.get(stage, 0.0) + time.monotonic() - begin, 1)
    record.write_text(json.dumps(kept, indent=2))


if __name__ == "__main__":
    main()
