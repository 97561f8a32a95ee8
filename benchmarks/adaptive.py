"""What adaptive prompts cost at run time: folded VAPT against the plain model, and a superset bundle of both kinds.

    python -m benchmarks.adaptive --backbone vit_small_patch16_224 --prompts 10 --threads 2

Weights are random: time does not depend on them. Every ratio is the median over rounds in which all variants take
turns.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from tempfile import TemporaryDirectory

import onnxruntime
import torch
from torch import nn

from benchmarks.models import CLASSES, deployed, preprocessing_of, random_vit, trained, yardstick
from benchmarks.tokens import TokenPromptedViT
from benchmarks.turns import measure_in_turns
from vpdeploy.bench.mixes import DISTINCT
from vpdeploy.bench.subject import Cell, Subject
from vpdeploy.format.layout import Family
from vpdeploy.machine import cpu_name
from vpdeploy_export import Folded, Switchable, export_model
from vpdeploy_train.methods import METHODS
from vpdeploy_train.methods.method import PromptDimensions
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.trunks import trunk_of

OPSET = 20
SLOTS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="vit_small_patch16_224")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    options = parser.parse_args()
    torch.manual_seed(0)
    vit = random_vit(options.backbone)
    models = {name: model_of(vit, name, options.prompts) for name in ("vpt-deep", "vapt")}
    print(
        f"{options.backbone}, {options.prompts} prompts, {options.threads} threads, {options.rounds} rounds; "
        f"{cpu_name()}, Python {platform.python_version()}, onnxruntime {onnxruntime.__version__}\n"
    )
    names = ("plain", "vpt-deep", "vapt", "adaptive bundle", "superset bundle")
    print(f"| batch | {' | '.join(f'{name} ms' for name in names)} | vapt/plain | superset/vapt |")
    print("|---" * (len(names) + 3) + "|")
    with TemporaryDirectory() as folder:
        subjects = open_all(Path(folder), vit, models, options.threads)
        for batch in options.batch_sizes:
            cell = Cell(batch=batch, mix=DISTINCT)
            runs = {name: subject.prepare(cell, seed=0) for name, subject in subjects.items()}
            result = measure_in_turns(runs, options.rounds, batch=batch)
            cells = [f"{result.median_ms(name):.1f}" for name in names]
            pairs = (("vapt", "plain"), ("superset bundle", "vapt"))
            cells += [result.ratio(*pair) for pair in pairs]
            print(f"| {batch} | {' | '.join(cells)} |")


def model_of(vit: nn.Module, name: str, prompts: int) -> PromptedViT:
    dimensions = PromptDimensions.of(trunk_of(vit))
    options = METHODS[name].Options(prompt_tokens=prompts)
    return PromptedViT(vit, METHODS[name].create(dimensions, options, torch.Generator().manual_seed(0)), CLASSES).eval()


def open_all(folder: Path, vit: nn.Module, models: dict[str, PromptedViT], threads: int) -> dict[str, Subject]:
    tasks = {name: trained(model, name, method=name) for name, model in models.items()}
    plain, size = TokenPromptedViT(vit, None, models["vapt"].head), preprocessing_of(vit).image_size
    subjects: dict[str, Subject] = {
        "plain": yardstick(folder / "plain.onnx", plain, size, opset=OPSET, threads=threads)
    }
    for name, task in tasks.items():
        path = export_model([task], folder / f"{name}.onnx", target=Folded(), opset=OPSET).path
        subjects[name] = deployed(path, threads=threads)
    families: dict[Family, tuple[str, ...]] = {"adaptive": ("vapt",), "superset": ("vapt", "vpt-deep")}
    for family, names in families.items():
        target = Switchable(family=family)
        path = export_model([tasks[name] for name in names], folder / family, target=target, opset=OPSET).path
        subjects[f"{family} bundle"] = deployed(path, threads=threads, tasks=SLOTS)
    return subjects


if __name__ == "__main__":
    main()
