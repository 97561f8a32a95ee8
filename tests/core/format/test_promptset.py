from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from core import toy

from vpdeploy.errors import BundleCorruptError, BundleVersionError, LayoutMismatchError, VpdeployError
from vpdeploy.format.promptset import CARD_FILE, TENSOR_FILE, CompiledPromptSet
from vpdeploy.format.tensorfile import encode_tensors

FOLDER = Path("tasks/flowers/1")


def decode(files: dict[str, bytes]) -> CompiledPromptSet:
    return CompiledPromptSet.decode(files, folder=FOLDER)


def card_with(**changes: object) -> dict[str, bytes]:
    files = toy.prompt_set().encode()
    fields = json.loads(files[CARD_FILE])
    task = {**fields["task"], **changes}
    return {**files, CARD_FILE: json.dumps({**fields, "task": task}).encode()}


def test_what_was_encoded_is_decoded():
    original = toy.prompt_set("warm", prefix=5, classes=2, parity={"images": 3})
    found = decode(original.encode())
    assert found.card == original.card
    assert found.layout == original.layout
    for name, array in original.tensors.items():
        np.testing.assert_array_equal(found.tensors[name], array)


def test_the_same_prompt_set_has_the_same_bytes():
    assert toy.prompt_set().encode() == toy.prompt_set().encode()


def test_size_is_the_sum_over_the_tensors():
    depth, heads, width, prefix, classes = toy.DEPTH, toy.HEADS, toy.HEAD_WIDTH, 5, 2
    keys_and_values = 2 * depth * heads * prefix * width
    numbers = keys_and_values + depth * prefix + toy.WIDTH * classes + classes
    assert toy.prompt_set(prefix=prefix, classes=classes).size_bytes == 4 * numbers


def test_another_version_is_refused():
    files = toy.prompt_set().encode()
    files[CARD_FILE] = files[CARD_FILE].replace(b'"format_version": 1', b'"format_version": 2')
    with pytest.raises(BundleVersionError, match=r"tasks/flowers/1/task\.json"):
        decode(files)


def test_a_run_is_not_a_compiled_prompt_set():
    files = toy.prompt_set().encode()
    files[CARD_FILE] = files[CARD_FILE].replace(b"vpdeploy.prompt-set", b"vpdeploy.run")
    with pytest.raises(BundleCorruptError, match=r"expected format 'vpdeploy\.prompt-set', found 'vpdeploy\.run'"):
        decode(files)


def test_damaged_tensors_are_named():
    files = toy.prompt_set().encode()
    with pytest.raises(BundleCorruptError, match=r"tasks/flowers/1/prompts\.safetensors"):
        decode({**files, TENSOR_FILE: files[TENSOR_FILE][:-1]})


def test_tensors_of_another_layout_are_refused():
    tensors = {**toy.prompt_set().tensors, "head_bias": np.zeros(4, np.float16)}
    with pytest.raises(LayoutMismatchError, match="head_bias"):
        decode({**toy.prompt_set().encode(), TENSOR_FILE: encode_tensors(tensors)})


@pytest.mark.parametrize(
    "change",
    [{"labels": []}, {"labels": "ab"}, {"labels": [1]}, {"name": "../up"}, {"name": ""}, {"details": []}],
    ids=str,
)
def test_an_unusable_card_is_refused(change: dict[str, object]):
    with pytest.raises(BundleCorruptError, match=r"task\.json"):
        decode(card_with(**change))


@pytest.mark.parametrize("labels", [["one"], [f"class {index}" for index in range(9)]])
def test_labels_and_head_must_agree(labels: list[str]):
    with pytest.raises(VpdeployError, match=rf"{len(labels)} labels.*4 classes"):
        decode(card_with(labels=labels))


@pytest.mark.parametrize(
    "change", [{"depth": 0}, {"width": 7}, {"heads": -2}, {"patch_size": 0}, {"sha256": None}], ids=str
)
def test_an_impossible_backbone_is_refused(change: dict[str, object]):
    with pytest.raises(BundleCorruptError, match="backbone"):
        decode(card_with(backbone={**toy.BACKBONE.to_fields(), **change}))
