"""Compiled prompt sets of a toy layout, made with NumPy alone, and a bundle of them whose graph is never run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vpdeploy.format.bundle import Bundle, publish_task, replace_bundle, withdraw_task
from vpdeploy.format.graphfacts import GraphFacts
from vpdeploy.format.layout import Layout
from vpdeploy.format.manifest import BundleFacts, Manifest
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy.format.promptset import CompiledPromptSet
from vpdeploy.format.task import BackboneId, TaskCard

DEPTH, HEADS, HEAD_WIDTH = 2, 2, 3
WIDTH = HEADS * HEAD_WIDTH
BACKBONE = BackboneId(name="toy", sha256="ab" * 32, depth=DEPTH, width=WIDTH, heads=HEADS, patch_size=4)
PREPROCESSING = Preprocessing(image_size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
LAYOUT = Layout.for_backbone(BACKBONE, dtype="float32")


def prompt_set(
    name: str = "flowers",
    *,
    prefix: int = 3,
    classes: int = 4,
    seed: int = 0,
    backbone: BackboneId = BACKBONE,
    preprocessing: Preprocessing = PREPROCESSING,
    layout: Layout = LAYOUT,
    **details: Any,
) -> CompiledPromptSet:
    """Random tensors that fit the layout."""
    rng = np.random.default_rng(seed)
    sizes = {"prefix": prefix, "classes": classes}
    tensors = {spec.name: rng.normal(size=spec.resolve(sizes)).astype(spec.dtype) for spec in layout.tensors}
    card = TaskCard(
        name=name,
        labels=tuple(f"class {index}" for index in range(classes)),
        method="e2vpt",
        backbone=backbone,
        preprocessing=preprocessing,
        details=details,
    )
    return CompiledPromptSet(card=card, layout=layout, tensors=tensors)


def facts(**changes: Any) -> BundleFacts:
    """What the toy tasks share; keywords replace fields."""
    graph = GraphFacts(precision="fp32", opset=20, image_input="uint8")
    return replace(BundleFacts(backbone=BACKBONE, preprocessing=PREPROCESSING, layout=LAYOUT, graph=graph), **changes)


def manifest(**changes: Any) -> Manifest:
    """The manifest of a bundle without tasks; keywords replace fields."""
    return replace(Manifest.of(facts(), graph_sha256="3" * 64, graph_data=None), **changes)


def write(path: Path, *prompt_sets: CompiledPromptSet, graph: bytes = b"not a graph") -> Bundle:
    """Write a bundle; the default tasks are ``flowers`` and ``birds``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.parent / "staged.onnx"
    staged.write_bytes(graph)
    chosen = list(prompt_sets) or [prompt_set("flowers"), prompt_set("birds", prefix=5, classes=2, seed=1)]
    return replace_bundle(path, facts(), chosen, staged)


def snapshot(path: Path) -> dict[str, bytes]:
    """Every visible file below a folder, except what locks are on."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name not in (".lock", ".holds")
    }


CHANGES: dict[str, Callable[[Path], object]] = {
    "publish": lambda path: publish_task(path, prompt_set("flowers", seed=9)),
    "add": lambda path: publish_task(path, prompt_set("new")),
    "withdraw": lambda path: withdraw_task(path, "flowers"),
    "replace": lambda path: write(path, prompt_set("other"), graph=b"another graph"),
}
"""Every way to change a bundle, by name."""
