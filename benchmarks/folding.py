"""What folding is worth: time of folded prompts against the plain model and against prompts as tokens.

    python -m benchmarks.folding --backbone vit_small_patch16_224 --prompts 50 --threads 2

Weights are random: time does not depend on them. Every ratio is the median over rounds in which all variants take
turns, so that a machine whose speed drifts slows all of them alike.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from tempfile import TemporaryDirectory

import onnxruntime
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from benchmarks.models import CLASSES, deployed, preprocessing_of, prompted_model, random_vit, trained, yardstick
from benchmarks.tokens import TokenPromptedViT
from benchmarks.turns import Measured, measure_in_turns
from vpdeploy.bench.mixes import DISTINCT
from vpdeploy.bench.subject import BatchRun, Cell, Subject
from vpdeploy.machine import cpu_name
from vpdeploy_export import Folded, Switchable, export_model
from vpdeploy_train.prompted import PromptedViT

SLOTS = 64


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    vit = random_vit(options.backbone)
    model = prompted_model(vit, options.prompts)
    results: dict[int, Measured] = {}
    with TemporaryDirectory() as folder:
        subjects = open_subjects(Path(folder), vit, model, options)
        for batch in options.batch_sizes:
            cell = Cell(batch=batch, mix=DISTINCT)
            runs = {name: subject.prepare(cell, seed=0) for name, subject in subjects.items()}
            results[batch] = measure_in_turns(runs, options.rounds, batch=batch)
    steps = training_runs(model, options.train_batch)
    training = measure_in_turns(steps, max(3, options.rounds // 3), batch=options.train_batch)
    print(render(options, results, training))
    if options.json:
        inference = [{"batch": batch, **result.to_fields()} for batch, result in results.items()]
        options.json.write_text(json.dumps({"inference": inference, "training": training.to_fields()}, indent=2))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="vit_small_patch16_224")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--opset", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--train-batch", type=int, default=8)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def open_subjects(
    folder: Path, vit: VisionTransformer, model: PromptedViT, options: argparse.Namespace
) -> dict[str, Subject]:
    """Each variant, exported and loaded."""
    size, threads, opset = preprocessing_of(vit).image_size, options.threads, options.opset
    prompts = [parameter.detach() for parameter in model.method.visual]
    plain, tokens = (TokenPromptedViT(vit, each, model.head) for each in (None, prompts))
    task = trained(model, "task")
    folded = export_model([task], folder / "folded.onnx", target=Folded(), opset=opset).path
    zoo = export_model([task], folder / "zoo", target=Switchable(), opset=opset).path
    return {
        "plain": yardstick(folder / "plain.onnx", plain, size, opset=opset, threads=threads),
        "tokens": yardstick(folder / "tokens.onnx", tokens, size, opset=opset, threads=threads),
        "folded": deployed(folded, threads=threads),
        "switchable": deployed(zoo, threads=threads, tasks=SLOTS),
    }


def training_runs(model: PromptedViT, batch: int) -> dict[str, BatchRun]:
    size = model.vit.patch_embed.img_size[0]
    pixels, labels = torch.randn(batch, 3, size, size), torch.randint(0, CLASSES, (batch,))
    prompts = [parameter.detach().clone().requires_grad_() for parameter in model.method.visual]
    tokens = TokenPromptedViT(model.vit, prompts, model.head)
    tokens.head.requires_grad_(True)
    for index, parameter in enumerate(prompts):
        setattr(tokens, f"prompt_{index}", parameter[None])
    model.train()

    def prefix_step() -> None:
        model.zero_grad()
        F.cross_entropy(model(pixels), labels).backward()

    def token_step() -> None:
        for index, parameter in enumerate(prompts):
            parameter.grad = None
            setattr(tokens, f"prompt_{index}", parameter[None])
        tokens.zero_grad()
        F.cross_entropy(tokens(pixels), labels).backward()

    return {"prefix": prefix_step, "tokens": token_step}


def render(options: argparse.Namespace, results: dict[int, Measured], training: Measured) -> str:
    lines = [
        f"{options.backbone}, {options.prompts} prompts, {options.threads} threads, opset {options.opset}, "
        f"{options.rounds} rounds; {cpu_name()}, {platform.system()}, Python {platform.python_version()}, "
        f"onnxruntime {onnxruntime.__version__}, torch {torch.__version__}",
        "",
        "| batch | plain ms | tokens ms | folded ms | switchable ms "
        "| folded/plain | folded/tokens | switchable/folded |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for batch, result in results.items():
        cells = [f"{result.median_ms(name):.1f}" for name in ("plain", "tokens", "folded", "switchable")]
        pairs = (("folded", "plain"), ("folded", "tokens"), ("switchable", "folded"))
        cells += [result.ratio(*pair) for pair in pairs]
        lines.append(f"| {batch} | {' | '.join(cells)} |")
    lines += [
        "",
        f"training step, batch {options.train_batch}: prefix {training.median_ms('prefix'):.0f} ms, "
        f"tokens {training.median_ms('tokens'):.0f} ms, ratio {training.ratio('prefix', 'tokens')}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
