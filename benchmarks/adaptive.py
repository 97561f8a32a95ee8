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

import numpy as np
import onnxruntime
import torch
from torch import nn

from benchmarks.folding import CLASSES, SLOTS, preprocessing_of, random_vit
from benchmarks.turns import measure_in_turns
from vpdeploy.backends.ort import CPU_PROVIDER, OrtBackend
from vpdeploy.bench.subject import BatchRun
from vpdeploy.layout import Family, GeneratorSpec, Layout
from vpdeploy.machine import cpu_name
from vpdeploy.table import Table
from vpdeploy.task import BackboneId, TaskCard
from vpdeploy_export.compilation import compile_prompts
from vpdeploy_export.graph import FoldedGraph, SwitchableGraph
from vpdeploy_export.packing import pack
from vpdeploy_export.saving import save_model
from vpdeploy_export.tokens import TokenPromptedViT, build_token_prompted
from vpdeploy_export.writer import build_folded, build_switchable
from vpdeploy_train.methods import METHODS
from vpdeploy_train.methods.method import PromptDimensions
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.trunks import trunk_of

OPSET = 20


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
        sessions = open_all(Path(folder), vit, models, options.threads)
        for batch in options.batch_sizes:
            result = measure_in_turns(runs_of(sessions, vit, batch), options.rounds, batch=batch)
            cells = [f"{result.median_ms(name):.1f}" for name in names]
            pairs = (("vapt", "plain"), ("superset bundle", "vapt"))
            cells += [result.ratio(*pair) for pair in pairs]
            print(f"| {batch} | {' | '.join(cells)} |")


def model_of(vit: nn.Module, name: str, prompts: int) -> PromptedViT:
    dimensions = PromptDimensions.of(trunk_of(vit))
    options = METHODS[name].Options(prompt_tokens=prompts)
    return PromptedViT(vit, METHODS[name].create(dimensions, options, torch.Generator().manual_seed(0)), CLASSES).eval()


def open_all(folder: Path, vit: nn.Module, models: dict[str, PromptedViT], threads: int) -> dict[str, OrtBackend]:
    preprocessing = preprocessing_of(vit)
    trunk = trunk_of(vit)
    plain = TokenPromptedViT(vit, None, models["vapt"].head)
    graphs = {"plain": build_token_prompted(plain, preprocessing.image_size, opset=OPSET)}
    compiled = {name: compile_prompts(model) for name, model in models.items()}
    settings = {"dtype": torch.float32, "opset": OPSET}
    for name, model in models.items():
        graph = FoldedGraph(trunk, preprocessing, compiled[name], model.head, image_input="uint8", **settings)
        graphs[name] = build_folded(graph, preprocessing, opset=OPSET)
    tables = {}
    families: dict[str, tuple[Family, tuple[str, ...]]] = {
        "adaptive bundle": ("adaptive", ("vapt",)),
        "superset bundle": ("superset", ("vapt", "vpt-deep")),
    }
    stage = trunk.stages[0]
    backbone = BackboneId(
        name="", sha256="", depth=stage.depth, width=stage.width, heads=stage.heads, patch_size=trunk.patch_size
    )
    for name, (family, methods) in families.items():
        spec = GeneratorSpec(patches=(trunk.grid or 0) ** 2, eps=None)
        layout = Layout.for_backbone(backbone, dtype="float32", family=family, generator=spec)
        graphs[name] = build_switchable(
            SwitchableGraph(trunk, preprocessing, layout, **settings), preprocessing, layout, opset=OPSET
        )
        labels = tuple(map(str, range(CLASSES)))
        sets = [
            pack(
                compiled[method],
                models[method].head,
                TaskCard(name=method, labels=labels, method=method, backbone=backbone, preprocessing=preprocessing),
                layout,
                trunk,
            )
            for method in methods
        ]
        tables[name] = Table.of([sets[slot % len(sets)] for slot in range(SLOTS)])
    backends = {}
    for name, graph in graphs.items():
        path = folder / f"{name}.onnx"
        save_model(graph, path, {})
        backends[name] = OrtBackend(path, provider=CPU_PROVIDER, threads=threads, reason="benchmark")
        if name in tables:
            backends[name].bind_table(tables[name])
    return backends


def runs_of(sessions: dict[str, OrtBackend], vit: nn.Module, batch: int) -> dict[str, BatchRun]:
    rng = np.random.default_rng(0)
    size = trunk_of(vit).image_size
    pixels = rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    normalised = rng.standard_normal((batch, 3, size, size), dtype=np.float32)
    slots = rng.permutation(SLOTS)[:batch].astype(np.int32)
    return {
        name: (
            lambda session=session, name=name: session.run(
                normalised if name == "plain" else pixels, slots if name.endswith("bundle") else None
            )
        )
        for name, session in sessions.items()
    }


if __name__ == "__main__":
    main()
