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

import numpy as np
import onnxruntime
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from benchmarks.turns import Measured, measure_in_turns
from vpdeploy.backends.ort import CPU_PROVIDER, OrtBackend
from vpdeploy.bench.subject import BatchRun
from vpdeploy.layout import Layout
from vpdeploy.machine import cpu_name
from vpdeploy.preprocessing import Preprocessing
from vpdeploy.table import Table
from vpdeploy.task import BackboneId
from vpdeploy_export.compilation import compile_prompts
from vpdeploy_export.graph import FoldedGraph, SwitchableGraph
from vpdeploy_export.saving import save_model
from vpdeploy_export.tokens import TokenPromptedViT, build_token_prompted
from vpdeploy_export.writer import build_folded, build_switchable
from vpdeploy_train.methods.e2vpt import E2VPT
from vpdeploy_train.methods.kept import Kept
from vpdeploy_train.methods.method import PromptDimensions
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.trunks import trunk_of

CLASSES = 100
SLOTS = 64


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    vit = random_vit(options.backbone)
    model = prompted_model(vit, options.prompts)
    results: dict[int, Measured] = {}
    with TemporaryDirectory() as folder:
        graphs = write_graphs(Path(folder), vit, model, options.opset)
        for batch in options.batch_sizes:
            runs = inference_runs(graphs, vit, options.prompts, batch, options.threads)
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


def random_vit(name: str) -> VisionTransformer:
    """A backbone whose biases are not zero: exporters drop what adds nothing."""
    vit = timm.create_model(name, pretrained=False, num_classes=0).eval().requires_grad_(False)
    for parameter in vit.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return vit


def prompted_model(vit: VisionTransformer, prompts: int) -> PromptedViT:
    dimensions = PromptDimensions.of(trunk_of(vit))
    return PromptedViT(vit, E2VPT(dimensions, Kept.everything(dimensions.depth, prompts, 0), dropout=0.0), CLASSES)


def write_graphs(folder: Path, vit: VisionTransformer, model: PromptedViT, opset: int) -> dict[str, Path]:
    preprocessing = preprocessing_of(vit)
    size = preprocessing.image_size
    prompts = [parameter.detach() for parameter in model.method.visual]
    layout = layout_of(vit)
    graphs = {
        "plain": build_token_prompted(TokenPromptedViT(vit, None, model.head), size, opset=opset),
        "tokens": build_token_prompted(TokenPromptedViT(vit, prompts, model.head), size, opset=opset),
        "folded": build_folded(
            FoldedGraph(
                model.trunk,
                preprocessing,
                compile_prompts(model),
                model.head,
                dtype=torch.float32,
                image_input="uint8",
                opset=opset,
            ),
            preprocessing,
            opset=opset,
        ),
        "switchable": build_switchable(
            SwitchableGraph(model.trunk, preprocessing, layout, dtype=torch.float32, opset=opset),
            preprocessing,
            layout,
            opset=opset,
        ),
    }
    paths = {}
    for name, graph in graphs.items():
        paths[name] = folder / f"{name}.onnx"
        save_model(graph, paths[name], {})
    return paths


def inference_runs(
    graphs: dict[str, Path], vit: VisionTransformer, prompts: int, batch: int, threads: int
) -> dict[str, BatchRun]:
    rng = np.random.default_rng(0)
    size = vit.patch_embed.img_size[0]
    pixels = rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    normalised = rng.standard_normal((batch, 3, size, size), dtype=np.float32)
    backends = {
        name: OrtBackend(path, provider=CPU_PROVIDER, threads=threads, reason="benchmark")
        for name, path in graphs.items()
    }
    table = Table(layout_of(vit), {"prefix": prompts, "classes": CLASSES}, SLOTS)
    for name in ("prefix_key", "prefix_value", "head_weight"):
        table.arrays[name][...] = rng.standard_normal(table.arrays[name].shape) * 0.1
    table.arrays["prefix_bias"][...] = 0.0
    backends["switchable"].bind_table(table)
    slots = rng.permutation(SLOTS)[:batch].astype(np.int32)
    return {
        "plain": lambda: backends["plain"].run(normalised, None),
        "tokens": lambda: backends["tokens"].run(normalised, None),
        "folded": lambda: backends["folded"].run(pixels, None),
        "switchable": lambda: backends["switchable"].run(pixels, slots),
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


def layout_of(vit: VisionTransformer) -> Layout:
    heads, depth = vit.blocks[0].attn.num_heads, len(vit.blocks)
    patch_size = vit.patch_embed.patch_size[0]
    backbone = BackboneId(name="", sha256="", depth=depth, width=vit.embed_dim, heads=heads, patch_size=patch_size)
    return Layout.for_backbone(backbone, dtype="float32")


def preprocessing_of(vit: VisionTransformer) -> Preprocessing:
    return Preprocessing(image_size=vit.patch_embed.img_size[0], mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


if __name__ == "__main__":
    main()
