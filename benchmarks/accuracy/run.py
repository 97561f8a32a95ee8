"""Train and test every (task, configuration, seed) that has no row yet.

A run that was interrupted continues with the trainer's own resume. Everything is chosen on the validation split; the
test split is read once for every final model, when its row is written.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.accuracy.configurations import CONFIGURATIONS, in_order
from benchmarks.accuracy.prepare import summary_path
from benchmarks.accuracy.presets import add_preset, apply_preset
from benchmarks.accuracy.suite import TASKS
from benchmarks.accuracy.table import RESULT_FILE, ResultTable
from benchmarks.accuracy.trainer import Setup, Trainer
from vpdeploy.errors import VpdeployError
from vpdeploy_train.backbone import load_backbone
from vpdeploy_train.methods import METHODS

SETUP_FILE = "setup.json"


def add_options(parser: argparse.ArgumentParser) -> None:
    add_preset(parser)
    parser.add_argument("--data", type=Path, required=True, help="what prepare wrote")
    parser.add_argument("--out", type=Path, required=True, help="runs, results.csv and setup.json")
    parser.add_argument("--backbone", default="vit_small_patch14_dinov2")
    parser.add_argument("--weights", type=Path, help="state dict of the backbone; default: timm's")
    parser.add_argument("--image-size", type=int, help="preset")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="preset")
    parser.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, help="preset")
    parser.add_argument("--seeds", type=int, nargs="+", help="preset; learning rates are chosen with the first")
    parser.add_argument("--epochs", type=int, help="preset")
    parser.add_argument("--batch-size", type=int, help="preset")
    parser.add_argument("--trials", type=int, help="preset; how many learning rates to try on validation")
    parser.add_argument("--keep", help="preset; shares of tokens that pruning tries, besides keeping all")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="preset")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="of torch on the CPU; default: torch's own")


def main(options: argparse.Namespace) -> int:
    apply_preset(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    names = in_order(options.configurations)
    if unknown := sorted({CONFIGURATIONS[name].method for name in names} - {*METHODS}):
        print(f"the trainer has no method {', '.join(unknown)}; leave it out of --configurations", file=sys.stderr)
        return 2
    if absent := [name for name in options.tasks if not summary_path(options.data, name).exists()]:
        print(f"{options.data}: no task {', '.join(absent)}; write it with prepare", file=sys.stderr)
        return 2
    try:
        run_all(options, names)
    except VpdeployError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    return 0


def run_all(options: argparse.Namespace, names: list[str]) -> None:
    """Fill the table seed by seed, so that an early stop leaves whole rounds of all configurations."""
    backbone = load_backbone(options.backbone, weights=options.weights, image_size=options.image_size)
    recipe = Setup(
        backbone=options.backbone,
        weights=None if options.weights is None else str(options.weights.resolve()),
        image_size=options.image_size,
        epochs=options.epochs,
        batch_size=options.batch_size,
        keep=options.keep,
        precision=options.precision,
        trials=options.trials,
        selection_seed=options.seeds[0],
        device=options.device,
    )
    check_setup(options.out / SETUP_FILE, {**asdict(recipe), "weights_sha256": backbone.identity.sha256})
    table = ResultTable(options.out / RESULT_FILE)
    trainer = Trainer(recipe=recipe, backbone=backbone, data=options.data, out=options.out / "runs")
    todo = [(task, name, seed) for seed in options.seeds for task in options.tasks for name in names]
    for number, key in enumerate(todo, start=1):
        if key not in table:
            row = trainer.finish(*key)
            table.add(row)
            print(
                f"[{number}/{len(todo)}] {row.task} {row.configuration} seed {row.seed}: val {row.val_accuracy:.3f}, "
                f"test {row.test_accuracy:.3f}, {row.prompt_parameters} prompt parameters, {row.seconds:.0f} s",
                flush=True,
            )


def check_setup(path: Path, setup: dict[str, object]) -> None:
    """Write what all rows of a result file share, or compare it with what is written.

    Raises:
        VpdeployError: The rows that are there were made with other settings.
    """
    free = {"weights", "device"}  # where the weights lie does not matter, their digest does
    if path.exists():
        stored = json.loads(path.read_text())
        if odd := [name for name in setup if name not in free and stored.get(name) != setup[name]]:
            name = odd[0]
            raise VpdeployError(f"{path}: {name} was {stored.get(name)}, now {setup[name]}; give another --out")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**setup, "weights": None}, indent=1))
