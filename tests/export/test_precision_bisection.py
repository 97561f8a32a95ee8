"""The first value that leaves tolerance is found, by block and part."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir as ir
import pytest

from vpdeploy.format.artifact import Artifact
from vpdeploy_export.export import ExportReport
from vpdeploy_export.parity import CHECK_WEIGHTS, Expectation
from vpdeploy_export.precision.bisection import Bisection, Deviation, Location, bisect, locate
from vpdeploy_export.precision.gate import advise_addition, advise_export


def scale_weight(source: Path, target: Path, name: str, factor: float) -> Path:
    """Write a copy of a graph in which one weight is larger."""
    model = onnx.load(source)
    (tensor,) = [each for each in model.graph.initializer if each.name == name]
    array = onnx.numpy_helper.to_array(tensor)
    scaled = (array.astype(np.float32) * factor).astype(array.dtype)
    assert np.isfinite(scaled).all()
    tensor.CopyFrom(onnx.numpy_helper.from_array(scaled, name))
    onnx.save(model, target)
    return target


def images(pixels: np.ndarray, *tasks: str) -> list[Expectation]:
    empty = np.zeros((len(pixels), 1), np.float32)
    return [Expectation(task=task, pixels=pixels, logits=empty, source="x") for task in tasks]


@pytest.mark.parametrize(
    ("weight", "factor", "block", "part", "value"),
    [
        ("blocks.0.projection.weight", 6e4, 0, "attention", "blocks.0.projection.MatMul"),
        ("blocks.1.mlp.fc1.weight", 3e4, 1, "mlp", "blocks.1.mlp.fc1.MatMul"),
        ("blocks.2.mlp.fc2.weight", 3e4, 2, "mlp", "blocks.2.mlp.fc2.MatMul"),
        ("blocks.2.query.weight", 6e4, 2, "attention", "blocks.2.class_token.MatMul_1"),
    ],
)
def test_a_weight_that_makes_one_value_overflow_is_named(
    half_folded: ExportReport, random_pixels, tmp_path: Path, weight, factor, block, part, value
):
    path = scale_weight(half_folded.path, tmp_path / "poisoned.onnx", weight, factor)
    found = bisect(Artifact.open(path), images(random_pixels(8), "flowers"))
    assert found.images == 8
    assert found.first is not None
    assert found.first.location == Location(block=block, part=part, name=value)
    assert math.isinf(found.first.relative_error)
    assert found.first.largest > 65504
    assert found.describe().startswith(
        f"block {block}, {part} ({value}) is the first value out of tolerance: it is not"
    )
    before = found.deviations[: found.deviations.index(found.first)]
    assert all(each.relative_error < 0.01 for each in before)


def test_a_sound_graph_has_no_such_value(half_folded: ExportReport, random_pixels):
    found = bisect(Artifact.open(half_folded.path), images(random_pixels(8), "flowers"))
    assert found.first is None
    errors = [each.relative_error for each in found.deviations]
    assert 2**-14 < max(errors) < found.tolerance  # it did round
    assert "no value of the graph is further than 2e-02" in found.describe()
    assert [each.location.block for each in found.worst_by_part()] == [None, 0, 0, 0, 1, 1, 1, 2, 2, 2, None]


def test_a_bundle_is_run_with_every_tasks_prompts(half_zoo: ExportReport, random_pixels):
    artifact = Artifact.open(half_zoo.path)
    sets = artifact.read_prompt_sets()
    pixels = random_pixels(4)
    sound = bisect(artifact, images(pixels, *artifact.tasks))
    assert (sound.first, sound.images) == (None, 12)
    # Values of 6e4 in one task's prompts alone: what comes of them overflows.
    loud = {**sets[1].tensors, "prefix_value": np.full_like(sets[1].tensors["prefix_value"], 6e4)}
    changed = artifact.with_prompt_sets([sets[0], replace(sets[1], tensors=loud), sets[2]])
    found = bisect(changed, images(pixels, *artifact.tasks))
    assert found.first is not None
    assert (found.first.location.block, found.first.location.part) == (0, "attention")


def test_the_first_value_and_the_worst_of_each_part():
    def deviation(block: int | None, part: str, name: str, error: float) -> Deviation:
        return Deviation(location=Location(block=block, part=part, name=name), relative_error=error, largest=2.0)

    values = (
        deviation(None, "embedding", "a", 0.001),
        deviation(0, "attention", "b", 0.01),
        deviation(0, "attention", "c", 0.03),
        deviation(0, "mlp", "d", math.inf),
        deviation(None, "head", "e", math.nan),
    )
    found = Bisection(deviations=values, tolerance=0.02, images=4)
    assert found.first == values[2]
    assert [each.location.name for each in found.worst_by_part()] == ["a", "c", "d", "e"]
    assert found.describe() == (
        "block 0, attention (c) is the first value out of tolerance: it differs from float32 by 0.03 of its largest "
        "value (allowed 2e-02)"
    )
    fields = found.to_fields()
    assert fields["first"] == {"value": "c", "block": 0, "part": "attention", "relative_error": 0.03, "largest": 2.0}
    assert [each["relative_error"] for each in fields["values"]] == [0.001, 0.01, 0.03, None, None]


def test_every_value_of_a_block_has_a_part(half_folded: ExportReport):
    model = ir.load(half_folded.path)
    placed: dict[str, list[str]] = {}
    for node in model.graph:
        location = locate(node, node.outputs[0])
        if location.block == 1:
            placed.setdefault(str(location.part), []).append(str(node.name).removeprefix("blocks.1."))
    assert {"query.MatMul", "key.MatMul", "MatMul", "Softmax", "MatMul_1", "projection.MatMul"} <= set(
        placed["attention"]
    )
    assert placed["residual"] == ["Add", "Add_1"] or placed["residual"][0].startswith("Add")
    assert {"mlp_norm.LayerNormalization", "mlp.fc1.MatMul", "mlp.act.Gelu", "mlp.fc2.MatMul"} <= set(placed["mlp"])


def test_where_the_precision_is_not_the_cause_the_advice_says_so(
    half_folded: ExportReport, folded_flowers: Path, random_pixels
):
    expectations = images(random_pixels(4), "flowers")
    advice = advise_export(Artifact.open(half_folded.path), expectations)
    assert "so the precision is not the cause; nothing was written; check that the run's backbone weights" in advice
    assert advise_export(Artifact.open(folded_flowers), expectations) == CHECK_WEIGHTS
    assert advise_addition("fp32") == CHECK_WEIGHTS
    assert advise_addition("bf16").endswith("try --fp16, or leave --bf16 out for float32")
