"""What learning rates do to a short training on a real backbone: validation accuracy at the start, at best, at the end.

    python -m benchmarks.accuracy prepare --preset gpu --tasks animals emoji location --data DATA --weights ENCODER
    python -m benchmarks.rates DATA/animals DATA/emoji --weights ENCODER --images 100 --epochs 10 --rates 0.1 0.03 auto

Takes so many training images of each folder, class by class in turn, and all its validation images, squashed to the
size and not varied.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from vpdeploy_train.backbone import load_backbone
from vpdeploy_train.settings import TrainSettings
from vpdeploy_train.training import train_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="each with train and val")
    parser.add_argument("--backbone", default="vit_small_patch14_dinov2")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--image-size", type=int, default=70)
    parser.add_argument("--methods", nargs="+", default=["e2vpt"])
    parser.add_argument("--rates", nargs="+", default=["default"], help="numbers, auto or default")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    backbone = load_backbone(options.backbone, weights=options.weights, image_size=options.image_size)
    print("| task | method | rate | start | best | last |\n|---|---|---|---|---|---|")
    for folder in options.folders:
        for method in options.methods:
            for rate in options.rates:
                with TemporaryDirectory() as scratch:
                    data = write_manifest(folder, options.images, Path(scratch) / "data.json")
                    settings = TrainSettings.of(
                        data=str(data),
                        method=method,
                        backbone=options.backbone,
                        weights=None if options.weights is None else str(options.weights),
                        image_size=options.image_size,
                        resize="squash",
                        augment="none",
                        prune=False,
                        epochs=options.epochs,
                        seed=options.seed,
                        lr=None if rate == "default" else rate if rate == "auto" else float(rate),
                    )
                    result = train_run(settings, Path(scratch) / "run", name="rates", backbone=backbone)
                    reached = read_accuracies(Path(scratch) / "run")
                lr = f"{result.chosen.lr:.3g}" + (f" ({rate})" if rate in ("auto", "default") else "")
                figures = (reached[0], max(reached[1:]), reached[-1])
                cells = [folder.name, method, lr, *(f"{100 * accuracy:.1f}" for accuracy in figures)]
                print(f"| {' | '.join(cells)} |", flush=True)


def write_manifest(folder: Path, images: int, path: Path) -> Path:
    """Write a manifest of so many training images, class by class in turn, and of all validation images."""
    classes = [sorted(each.iterdir()) for each in (folder / "train").iterdir()]
    turns = sorted((turn, file) for files in classes for turn, file in enumerate(files))
    chosen = [("train", file) for _, file in turns[:images]] + [("val", file) for file in folder.glob("val/*/*")]
    rows = [{"path": str(file.resolve()), "label": file.parent.name, "split": split} for split, file in sorted(chosen)]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def read_accuracies(run: Path) -> list[float]:
    """Return the validation accuracy of the start and of every epoch."""
    with (run / "history.csv").open(encoding="utf-8", newline="") as stream:
        return [float(row["val_accuracy"]) for row in csv.DictReader(stream)]


if __name__ == "__main__":
    main()
