from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from core import toy

from vpdeploy.document import Document
from vpdeploy.errors import BundleCorruptError, LayoutMismatchError
from vpdeploy.layout import MASKED, Layout


def layout(**changes: Any) -> Layout:
    return Layout.for_prefix(
        **{"depth": 12, "heads": 12, "head_width": 64, "width": 768, "dtype": "float32", **changes}
    )


def read(fields: dict[str, Any]) -> Layout:
    return Layout.from_document(Document("manifest.json: layout", fields))


def test_the_digest_is_the_sha256_of_the_canonical_json():
    canonical = (
        '[{"dtype":"float32","name":"prefix_key","padding":0.0,"shape":[12,12,"prefix",64]},'
        '{"dtype":"float32","name":"prefix_value","padding":0.0,"shape":[12,12,"prefix",64]},'
        '{"dtype":"float32","name":"prefix_bias","padding":-30000.0,"shape":[12,"prefix"]},'
        '{"dtype":"float32","name":"head_weight","padding":0.0,"shape":[768,"classes"]},'
        '{"dtype":"float32","name":"head_bias","padding":-30000.0,"shape":["classes"]}]'
    )
    assert layout().digest == hashlib.sha256(canonical.encode()).hexdigest()


@pytest.mark.parametrize(
    "change", [{"dtype": "float16"}, {"depth": 11}, {"heads": 6}, {"head_width": 32}, {"width": 384}], ids=str
)
def test_the_digest_changes_with_every_size_and_dtype(change: dict[str, Any]):
    assert layout(**change).digest != layout().digest


def test_only_keys_and_values_are_narrow():
    dtypes = {spec.name: spec.dtype for spec in layout(dtype="float16").tensors}
    assert dtypes == {
        "prefix_key": "float16",
        "prefix_value": "float16",
        "prefix_bias": "float32",
        "head_weight": "float32",
        "head_bias": "float32",
    }


def test_masked_columns_weigh_nothing_and_are_finite_in_float16():
    assert np.isfinite(np.float16(MASKED))
    assert np.exp(np.float32(MASKED) + np.float32(10_000)) == 0


def test_the_json_form_reads_back_as_the_same():
    assert read(layout().to_fields()) == layout()


@pytest.mark.parametrize(
    ("key", "value"),
    [("dtype", "float64"), ("dtype", 3), ("shape", [1.5]), ("shape", None), ("name", None), ("padding", "0")],
)
def test_an_impossible_tensor_is_refused(key: str, value: object):
    fields = layout().to_fields()
    fields["tensors"][1][key] = value
    with pytest.raises(BundleCorruptError, match=r"manifest\.json: layout: tensors\[1\]"):
        read(fields)


def test_a_digest_of_other_tensors_is_refused():
    with pytest.raises(BundleCorruptError, match="digest"):
        read({**layout().to_fields(), "digest": layout(depth=6).digest})


def test_sizes_are_found_in_the_tensors():
    assert toy.LAYOUT.sizes_of(toy.prompt_set(prefix=5, classes=7).tensors, source="x") == {"prefix": 5, "classes": 7}
    assert toy.LAYOUT.sizes_of(toy.prompt_set(prefix=0).tensors, source="x") == {"prefix": 0, "classes": 4}


@pytest.mark.parametrize(
    ("name", "replacement"),
    [
        ("prefix_key", None),
        ("prefix_key", np.zeros((2, 2, 3, 4), np.float32)),
        ("prefix_key", np.zeros((2, 2, 3, 3), np.float16)),
        ("prefix_key", np.zeros((2, 2, 9), np.float32)),
        ("prefix_value", np.zeros((2, 2, 4, 3), np.float32)),
        ("head_bias", np.zeros(5, np.float32)),
        ("head_weight", np.full((6, 4), np.nan, np.float32)),
        ("head_bias", np.full(4, np.inf, np.float32)),
        ("surplus", np.zeros(1, np.float32)),
    ],
)
def test_tensors_that_do_not_fit_are_named(name: str, replacement: np.ndarray | None):
    tensors = dict(toy.prompt_set(prefix=3, classes=4).tensors)
    if replacement is None:
        del tensors[name]
    else:
        tensors[name] = replacement
    with pytest.raises(LayoutMismatchError, match=f"^task 'x'.*{name}"):
        toy.LAYOUT.sizes_of(tensors, source="task 'x'")
