from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from core import toy

from vpdeploy.errors import BundleCorruptError, LayoutMismatchError
from vpdeploy.format.document import Document
from vpdeploy.format.layout import MASKED, Family, GeneratorSpec, Layout
from vpdeploy.format.task import BackboneId, Stage

BASE = BackboneId(name="vit", sha256="0" * 64, depth=12, width=768, heads=12, patch_size=16)
GENERATOR = GeneratorSpec(patches=196, eps=None)


def layout(dtype: str = "float32", **changes: Any) -> Layout:
    return Layout.for_backbone(replace(BASE, **changes), dtype=dtype)


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


@pytest.mark.parametrize("change", [{"dtype": "float16"}, {"depth": 11}, {"heads": 6}, {"width": 384}], ids=str)
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
    [
        ("dtype", "float64"),
        ("dtype", 3),
        ("shape", [1.5]),
        ("shape", [True]),
        ("shape", [-1]),
        ("shape", []),
        ("shape", None),
        ("name", None),
        ("padding", "0"),
    ],
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


def adaptive(family: Family, **changes: Any) -> Layout:
    return Layout.for_backbone(BASE, dtype="float16", family=family, generator=replace(GENERATOR, **changes))


@pytest.mark.parametrize("family", ["adaptive", "superset"])
def test_generator_tables_have_a_row_for_every_block_but_the_first(family: Family):
    shapes = {spec.name: spec.shape for spec in adaptive(family).tensors}
    assert shapes["prefix_key"] == (1 if family == "adaptive" else 12, 12, "prefix", 64)
    assert shapes["generator_mix"] == (11, "generated", 196)
    assert shapes["generator_scale"] == (11, 768)
    assert shapes["generator_shift"] == (11, "generated", 768)
    assert shapes["generator_down"] == ("hidden", 768)
    assert shapes["generator_up"] == (768, "hidden")
    padding = {spec.name: spec.padding for spec in adaptive(family).tensors}
    assert padding["generator_bias"] == MASKED
    assert adaptive(family).axes == ("prefix", "generated", "hidden", "classes")


@pytest.mark.parametrize("family", ["adaptive", "superset"])
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_an_adaptive_layout_reads_back_with_its_family(family: Family, eps: float | None):
    written = adaptive(family, eps=eps)
    assert read(written.to_fields()) == written
    assert (written.family, layout().family) == (family, "prefix")


def test_a_generator_without_a_prefix_is_refused():
    tensors = tuple(spec for spec in adaptive("superset").tensors if not spec.name.startswith("prefix"))
    with pytest.raises(BundleCorruptError, match="a generator and no tensor 'prefix_key'"):
        read(Layout(tensors=tensors, generator=GENERATOR).to_fields())


def test_the_digest_tells_the_generators_norms_apart():
    digests = {adaptive("superset", eps=eps).digest for eps in (None, 1e-5, 1e-6)}
    assert len(digests | {adaptive("adaptive").digest}) == 4


def test_a_hierarchy_has_a_prefix_table_for_each_stage():
    stages = (Stage(depth=2, width=96, heads=3), Stage(depth=6, width=192, heads=6))
    backbone = replace(BASE, depth=8, width=192, heads=6, hierarchy=stages)
    shapes = {spec.name: spec.shape for spec in Layout.for_backbone(backbone, dtype="float32").tensors}
    assert shapes["prefix_key_0"] == (2, 3, "prefix", 32)
    assert shapes["prefix_value_1"] == (6, 6, "prefix", 32)
    assert shapes["prefix_bias_1"] == (6, "prefix")
    assert shapes["head_weight"] == (192, "classes")
