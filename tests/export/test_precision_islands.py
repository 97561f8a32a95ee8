"""What the largest activations decide, by hand."""

from __future__ import annotations

import math

import pytest

from vpdeploy_export.precision.decision import LARGEST, MARGIN, PrecisionReport, choose_islands
from vpdeploy_export.precision.islands import NO_ISLANDS, Islands
from vpdeploy_export.precision.probe import Maxima, part_of

EDGE = 65504 / 4


def maxima(**blocks: dict[str, float]) -> Maxima:
    return Maxima(found={name.replace("_", "."): places for name, places in blocks.items()})


def test_the_limit_is_a_quarter_of_float16s_largest_number():
    assert LARGEST["fp16"] / MARGIN == EDGE
    below, above = ({"mlp.fc1": EDGE * factor} for factor in (0.999, 1.001))
    assert not choose_islands(maxima(blocks_0=below), "fp16", depth=1)
    assert choose_islands(maxima(blocks_0=above), "fp16", depth=1).of(0) == {"mlp"}


@pytest.mark.parametrize(
    ("place", "part"),
    [
        ("query", "attention"),
        ("logits", "attention"),
        ("prefix_logits", "attention"),
        ("generated", "attention"),
        ("generator_hidden", "attention"),
        ("mixed", "attention"),
        ("projection", "attention"),
        ("norm", "attention"),
        ("mlp_norm", "mlp"),
        ("mlp.fc1", "mlp"),
        ("mlp.hidden", "mlp"),
        ("mlp_scale", "mlp"),
        ("tokens", "residual"),
        ("merging.reduction", "residual"),
    ],
)
def test_a_place_widens_its_part(place: str, part: str):
    assert part_of(place) == part
    islands = choose_islands(maxima(blocks_1={place: 2 * EDGE}), "fp16", depth=2)
    assert (islands.of(0), islands.of(1)) == (frozenset(), {part})


def test_constants_need_no_margin():
    assert not choose_islands(maxima(blocks_0={"mlp.weights": 65504.0}), "fp16", depth=1)
    assert choose_islands(maxima(blocks_0={"mlp.weights": 65505.0}), "fp16", depth=1).of(0) == {"mlp"}


def test_float32_tokens_stay_so_up_to_the_final_norm():
    islands = choose_islands(maxima(blocks_1={"tokens": 2 * EDGE, "mlp.fc2": 2 * EDGE}), "fp16", depth=4)
    assert [islands.of(index) for index in range(4)] == [set(), {"mlp", "residual"}, {"residual"}, {"residual"}]
    assert (islands.embedding, islands.final) == (False, True)


def test_embedding_and_final_norm_are_places_too():
    islands = choose_islands(maxima(embedding={"output": 2 * EDGE}), "fp16", depth=1)
    assert (islands.embedding, islands.final, bool(islands)) == (True, False, True)
    assert choose_islands(maxima(final={"output": 2 * EDGE}), "fp16", depth=1).final


def test_an_activation_that_is_not_finite_is_out_of_range():
    assert choose_islands(maxima(blocks_0={"logits": math.inf}), "fp16", depth=1).of(0) == {"attention"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_types_of_float32s_range_need_nothing(precision: str):
    assert not choose_islands(maxima(blocks_0={"logits": 1e30}), precision, depth=1)  # type: ignore[arg-type]


def test_islands_are_told_in_words_and_in_json():
    islands = Islands(
        blocks={
            2: frozenset({"mlp", "residual"}),
            3: frozenset({"residual"}),
            4: frozenset({"residual"}),
            6: frozenset({"attention"}),
        },
        final=True,
    )
    assert islands.describe() == "block 6 attention, block 2 mlp, blocks 2-4 residual, final norm"
    assert islands.to_fields() == {
        "blocks.2": ["mlp", "residual"],
        "blocks.3": ["residual"],
        "blocks.4": ["residual"],
        "blocks.6": ["attention"],
        "final": ["norm"],
    }
    assert not NO_ISLANDS
    assert NO_ISLANDS.to_fields() == {}


def test_the_report_is_small_and_json_ready():
    report = PrecisionReport(
        precision="fp16",
        islands=Islands(embedding=True),
        maxima=maxima(blocks_0={"logits": 1234.5678, "mlp.fc1": math.inf}),
        images={"flowers": "4 images of x"},
    )
    assert report.to_fields() == {
        "type": "fp16",
        "float32": {"embedding": ["weights"]},
        "probe": {
            "largest": 65504.0,
            "margin": 4.0,
            "images": {"flowers": "4 images of x"},
            "maxima": {"blocks.0": {"logits": 1230.0, "mlp.fc1": "inf"}},
        },
    }
