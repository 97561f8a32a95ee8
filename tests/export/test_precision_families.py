"""Float16 and bfloat16 graphs of every family, rounded after every operation, are close to the trained model."""

from __future__ import annotations

from pathlib import Path

import architectures
import numpy as np
import onnxruntime
import pytest
import torch
from test_backbone_graphs import difference, expected_logits, random_pixels

from vpdeploy_export.compilation import compile_prompts, deployed_trunk
from vpdeploy_export.graph import FoldedGraph
from vpdeploy_export.onnx.save import save_model
from vpdeploy_export.onnx.trace import build_folded
from vpdeploy_export.parity import TOLERANCES
from vpdeploy_export.passes.narrow import TYPES
from vpdeploy_export.precision.islands import IslandPart, Islands
from vpdeploy_export.precision.twins import open_rounded
from vpdeploy_train.prompted import PromptedViT

SLOW = pytest.mark.slow
QUICK = {("ViT-Ti/16", "bf16"), ("RMS norms", "fp16"), ("DINOv3", "bf16"), ("Swin-T", "fp16")}
CASES = [
    pytest.param(case, precision, marks=() if (case, precision) in QUICK else SLOW)
    for case in ("ViT-Ti/16", "RMS norms", "DINOv3", "Swin-T", "EVA-02", "SigLIP")
    for precision in ("fp16", "bf16")
]
TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16}


def write(model: PromptedViT, path: Path, precision: str, islands: Islands) -> FoldedGraph:
    settings = architectures.preprocessing_of(model.vit)
    graph = FoldedGraph(
        deployed_trunk(model),
        settings,
        compile_prompts(model),
        model.head,
        dtype=TORCH[precision],
        image_input="uint8",
        opset=20,
        islands=islands,
    )
    onnx_model = build_folded(graph, settings, opset=20)
    save_model(onnx_model, path)
    norms = [node for node in onnx_model.graph if node.op_type in ("Pow", "ReduceMean", "Sqrt") and "norm" in node.name]
    assert all(node.outputs[0].dtype not in TYPES.values() for node in norms), "a norm taken apart overflows float16"
    return graph


@pytest.mark.parametrize(("case", "precision"), CASES)
def test_a_narrow_graph_is_within_tolerance(tmp_path: Path, case: str, precision: str):
    model = architectures.with_prompts(architectures.make(case))
    pixels = random_pixels(model.vit)
    expected = expected_logits(model, pixels)
    path = tmp_path / "task.onnx"
    write(model, path, precision, Islands())
    found = open_rounded(path, precision, tmp_path).run(pixels, None)  # type: ignore[arg-type]
    assert 1e-5 < difference(found, expected) < TOLERANCES[precision].exported  # type: ignore[index]
    if precision == "fp16":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert difference(session.run(None, {"image": pixels})[0], expected) < TOLERANCES["fp16"].exported


@pytest.mark.parametrize("case", ["DINOv3", pytest.param("Swin-T", marks=SLOW)])
def test_any_parts_of_a_graph_can_be_float32(tmp_path: Path, case: str):
    """All of them make a float32 graph; a checkerboard of them is at least well typed and close."""
    model = architectures.with_prompts(architectures.make(case))
    pixels = random_pixels(model.vit)
    expected = expected_logits(model, pixels)
    depth = len(model.trunk.blocks)
    every: frozenset[IslandPart] = frozenset({"attention", "mlp", "residual"})
    whole = Islands(blocks=dict.fromkeys(range(depth), every), embedding=True, final=True)
    checkered = Islands(
        blocks={index: frozenset({"attention", "residual"} if index % 2 else {"mlp"}) for index in range(depth)}
    )
    for islands, allowed in ((whole, 1e-4), (checkered, TOLERANCES["fp16"].exported)):
        write(model, tmp_path / "task.onnx", "fp16", islands)
        found = open_rounded(tmp_path / "task.onnx", "fp16", tmp_path).run(pixels, None)
        assert difference(found, expected) < allowed
        assert np.isfinite(found).all()
