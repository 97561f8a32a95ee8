"""An engine of the widths that are deployed: ViT-B/16, float16, both families of prompts, no GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vpdeploy.engines.building import BuildRequest, build_engine
from vpdeploy.engines.store import verify_engine
from vpdeploy.engines.toolkit import Toolkit
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.bundle import write_bundle
from vpdeploy.format.graphfacts import GraphFacts
from vpdeploy.format.layout import GeneratorSpec, Layout
from vpdeploy.format.manifest import BundleFacts
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy.format.task import BackboneId

BACKBONE = BackboneId(name="vit-b", sha256="ab" * 32, depth=12, width=768, heads=12, patch_size=16)
PREPROCESSING = Preprocessing(image_size=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
ENCODER = 85_800_000
"""Parameters of the encoder (arXiv 2010.11929, table 1: 86 M with the head)."""
BLOCK = 12 * 768**2 + 13 * 768
"""Parameters of a block: four square projections, an MLP of four widths, their biases and two norms."""


@pytest.fixture(scope="module", params=[2, pytest.param(12, marks=pytest.mark.slow)])
def depth(request: pytest.FixtureRequest) -> int:
    """Blocks: all twelve are alike, and two have a first one and a last one, which differ."""
    return int(request.param)


@pytest.fixture(scope="module")
def large_graph(depth: int, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A bundle of no tasks over a random ViT-B/16 of so many blocks."""
    pytest.importorskip("onnxscript", reason="needs the export extra")
    import torch
    from timm.models.vision_transformer import VisionTransformer

    from vpdeploy_export.graph import SwitchableGraph
    from vpdeploy_export.onnx.save import save_model
    from vpdeploy_export.onnx.trace import build_switchable
    from vpdeploy_train.trunks import trunk_of

    backbone = replace(BACKBONE, depth=depth)
    layout = Layout.for_backbone(
        backbone, dtype="float16", family="superset", generator=GeneratorSpec(patches=196, eps=None)
    )
    vit = VisionTransformer(num_classes=0, depth=depth, weight_init="skip").eval().requires_grad_(False)
    graph = SwitchableGraph(trunk_of(vit), PREPROCESSING, layout, dtype=torch.float16, opset=20)
    folder = tmp_path_factory.mktemp("large")
    save_model(build_switchable(graph, PREPROCESSING, layout, opset=20), folder / "staged.onnx")
    facts = BundleFacts(
        backbone=backbone,
        preprocessing=PREPROCESSING,
        layout=layout,
        graph=GraphFacts(precision="fp16", opset=20, image_input="uint8"),
    )
    return Artifact.of_bundle(write_bundle(folder / "zoo", facts, [], folder / "staged.onnx"))


def test_an_engine_of_deployed_size_is_built_without_a_gpu(rtx: Toolkit, large_graph: Artifact, depth: int):
    request = BuildRequest(runtime="tensorrt-rtx", targets=("sm_80", "sm_86", "sm_89", "sm_120"))
    result = build_engine(large_graph, request)
    verify_engine(result.engine)
    card = result.engine.card
    weights_bytes = 2 * (ENCODER - (12 - depth) * BLOCK)
    assert weights_bytes < card.size_bytes < 1.2 * weights_bytes
    assert card.inputs["prefix_key"].shape == ("slots", depth, 12, "prefix", 64)
    assert card.inputs["generator_mix"].shape == ("slots", depth - 1, "generated", 196)
    assert card.inputs["image"].shape == ("batch", 224, 224, 3)
    assert not build_engine(large_graph, request).built
