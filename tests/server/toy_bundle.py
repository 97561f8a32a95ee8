"""A tiny switchable bundle on real ONNX Runtime: a task's logits are its head applied to the mean colour."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from vpdeploy.format.bundle import Bundle, write_bundle
from vpdeploy.format.folded import FoldedCard
from vpdeploy.format.graphfacts import GraphFacts
from vpdeploy.format.layout import BATCH_AXIS, CLASS_AXIS, IMAGE, LOGITS, SLOT, SLOT_AXIS, Layout
from vpdeploy.format.manifest import BundleFacts
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy.format.promptset import CompiledPromptSet
from vpdeploy.format.task import BackboneId, TaskCard

SIDE = 16
SCALE = 10.0
CHANNELS = {"red": 0, "green": 1, "blue": 2}
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
TASKS = {"rgb": ("red", "green", "blue"), "bgr": ("blue", "green", "red"), "warm": ("red", "blue")}
"""Labels of the toy tasks: each names the channels that its head looks at."""

BACKBONE = BackboneId(name="toy", sha256=hashlib.sha256(b"toy").hexdigest(), depth=1, width=3, heads=1, patch_size=8)
PREPROCESSING = Preprocessing(
    image_size=SIDE, resize="squash", crop_ratio=1.0, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3
)
LAYOUT = Layout.for_backbone(BACKBONE, dtype="float32")
GRAPH = GraphFacts(precision="fp32", opset=20, image_input="uint8")


def prompt_set(task: str, labels: tuple[str, ...], *, prefix: int = 2, scale: float = SCALE) -> CompiledPromptSet:
    """Logit of a label = ``scale`` times the mean of its channel, pixels in [0, 1]."""
    head = np.zeros((3, len(labels)), np.float32)
    for index, label in enumerate(labels):
        head[CHANNELS[label.partition("-")[0]], index] = scale
    return CompiledPromptSet(
        card=TaskCard(name=task, labels=labels, method="e2vpt", backbone=BACKBONE, preprocessing=PREPROCESSING),
        layout=LAYOUT,
        tensors={
            "prefix_key": np.zeros((1, 1, prefix, 3), np.float32),
            "prefix_value": np.zeros((1, 1, prefix, 3), np.float32),
            "prefix_bias": np.zeros((1, prefix), np.float32),
            "head_weight": head,
            "head_bias": np.zeros(len(labels), np.float32),
        },
    )


def write_toy_bundle(path: Path, tasks: dict[str, tuple[str, ...]] | None = None) -> Bundle:
    """Write the bundle; the graph goes through a file beside it."""
    graph = path.with_suffix(".graph.onnx")
    onnx.save(_switchable_graph(), graph)
    facts = BundleFacts(backbone=BACKBONE, preprocessing=PREPROCESSING, layout=LAYOUT, graph=GRAPH)
    return write_bundle(path, facts, [prompt_set(name, labels) for name, labels in (tasks or TASKS).items()], graph)


def write_toy_folded(path: Path, task: str) -> Path:
    """Write one toy task as a folded model: its head is a constant of the graph."""
    prompts = prompt_set(task, TASKS[task])
    constants = {
        "pixel_axes": np.array([1, 2], np.int64),
        "weight": prompts.tensors["head_weight"] / np.float32(255),
    }
    nodes = [
        helper.make_node("Cast", [IMAGE], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "pixel_axes"], ["means"], keepdims=0),
        helper.make_node("MatMul", ["means", "weight"], [LOGITS]),
    ]
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info(IMAGE, TensorProto.UINT8, [BATCH_AXIS, SIDE, SIDE, 3])],
        [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, [BATCH_AXIS, len(TASKS[task])])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    card = FoldedCard(task=prompts.card, graph=GRAPH)
    helper.set_model_props(model, card.to_metadata())
    onnx.save(model, path)
    return path


def solid(colour: str, *, side: int = SIDE) -> np.ndarray:
    """Pixels of one colour, uint8 [side, side, 3]."""
    return np.full((side, side, 3), COLOURS[colour], np.uint8)


def encoded(colour: str, *, side: int = 48, file_format: str = "PNG") -> bytes:
    """An image file of one colour."""
    buffer = io.BytesIO()
    Image.fromarray(solid(colour, side=side)).save(buffer, format=file_format)
    return buffer.getvalue()


def expected_logits(colour: str, labels: tuple[str, ...]) -> list[float]:
    """What a toy task says of a solid colour."""
    return [SCALE if label == colour else 0.0 for label in labels]


def _switchable_graph() -> onnx.ModelProto:
    inputs = [
        helper.make_tensor_value_info(IMAGE, TensorProto.UINT8, [BATCH_AXIS, SIDE, SIDE, 3]),
        helper.make_tensor_value_info(SLOT, TensorProto.INT32, [BATCH_AXIS]),
    ]
    for spec in LAYOUT.tensors:
        inputs.append(helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, [SLOT_AXIS, *spec.shape]))
    constants = {
        "pixel_axes": np.array([1, 2], np.int64),
        "middle": np.array([1], np.int64),
        "scale": np.array(1 / 255, np.float32),
        "zero": np.array(0, np.float32),
    }
    nodes = [
        helper.make_node("Cast", [IMAGE], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "pixel_axes"], ["means"], keepdims=0),
        helper.make_node("Mul", ["means", "scale"], ["colour"]),
        helper.make_node("Unsqueeze", ["colour", "middle"], ["features"]),
        helper.make_node("Gather", ["head_weight", SLOT], ["weight"], axis=0),
        helper.make_node("Gather", ["head_bias", SLOT], ["bias"], axis=0),
        helper.make_node("MatMul", ["features", "weight"], ["product"]),
        helper.make_node("Squeeze", ["product", "middle"], ["scores"]),
        helper.make_node("Add", ["scores", "bias"], ["plain"]),
    ]
    total = "plain"
    for name in ("prefix_key", "prefix_value", "prefix_bias"):  # read, and without effect
        nodes += [
            helper.make_node("ReduceSum", [name], [f"{name}_sum"], keepdims=0),
            helper.make_node("Mul", [f"{name}_sum", "zero"], [f"{name}_nothing"]),
            helper.make_node("Add", [total, f"{name}_nothing"], [f"{name}_total"]),
        ]
        total = f"{name}_total"
    nodes.append(helper.make_node("Identity", [total], [LOGITS]))
    graph = helper.make_graph(
        nodes,
        "toy",
        inputs,
        [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, [BATCH_AXIS, CLASS_AXIS])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
