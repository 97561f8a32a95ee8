from __future__ import annotations

from typing import Any

import pytest

from vpdeploy.errors import BundleCorruptError
from vpdeploy.format.document import Document
from vpdeploy.format.preprocessing import Preprocessing

CHOSEN = Preprocessing(
    image_size=224, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 1.0), resize="squash", crop_ratio=1.0, interpolation="bilinear"
)


def read(**changes: Any) -> Preprocessing:
    return Preprocessing.from_document(Document("card.json", {**CHOSEN.to_fields(), **changes}))


def test_the_json_form_reads_back_as_the_same():
    assert read() == CHOSEN


@pytest.mark.parametrize("field", list(CHOSEN.to_fields()))
def test_a_missing_field_is_named(field: str):
    fields = {name: value for name, value in CHOSEN.to_fields().items() if name != field}
    with pytest.raises(BundleCorruptError, match=rf"card\.json: field '{field}' is missing"):
        Preprocessing.from_document(Document("card.json", fields))


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": 0},
        {"image_size": -224},
        {"image_size": 4097},
        {"image_size": 224.0},
        {"crop_ratio": 0},
        {"crop_ratio": 1.01},
        {"crop_ratio": float("nan")},
        {"mean": [0.5, 0.5]},
        {"mean": [0.5, 0.5, float("nan")]},
        {"std": [0.5, 0.5, 0.5, 0.5]},
        {"std": [0.5, 0, 0.5]},
        {"std": [float("inf"), 0.5, 0.5]},
        {"resize": "stretch"},
        {"interpolation": "nearest"},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(change: dict[str, Any]):
    with pytest.raises(BundleCorruptError, match=r"card\.json"):
        read(**change)


def test_a_difference_names_the_field_and_both_values():
    assert CHOSEN.difference(read()) is None
    assert CHOSEN.difference(read(image_size=64)) == "image_size 224 != 64"
    assert CHOSEN.difference(read(mean=[0, 0.2, 0.3])) == "mean [0.1, 0.2, 0.3] != [0.0, 0.2, 0.3]"
