from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from core import toy

from vpdeploy.errors import BundleCorruptError, BundleVersionError, TaskNotFoundError
from vpdeploy.format.document import Document
from vpdeploy.format.manifest import Manifest, TaskEntry

FILES = {"task.json": "1" * 64, "prompts.safetensors": "2" * 64}


def sample() -> Manifest:
    entry = TaskEntry(version=2, files={1: FILES, 2: FILES, 10: FILES})
    return toy.manifest(tasks={"b": entry, "a": TaskEntry(version=1, files={1: {}})})


def read(fields: dict[str, Any]) -> Manifest:
    return Manifest.from_document(Document("zoo/manifest.json", fields))


def test_the_json_form_reads_back_as_the_same_in_the_same_order():
    found = read(sample().to_fields())
    assert found == sample()
    assert list(found.tasks) == ["b", "a"]


def test_versions_are_written_in_numeric_order():
    assert list(sample().to_fields()["tasks"]["b"]["files"]) == ["1", "2", "10"]


def test_the_previous_version_is_the_largest_smaller_one():
    assert sample().tasks["b"].previous_version == 1
    assert replace(sample().tasks["b"], version=10).previous_version == 2
    assert sample().tasks["a"].previous_version is None


def test_an_unknown_task_is_named_together_with_the_known_ones():
    with pytest.raises(TaskNotFoundError, match="no task 'x' in the bundle; it holds: b, a"):
        sample().entry("x")
    with pytest.raises(TaskNotFoundError, match="holds: none"):
        toy.manifest().entry("x")


def test_changing_a_manifest_leaves_the_original():
    original = sample()
    assert list(original.without_task("b").tasks) == ["a"]
    assert list(original.with_task("c", original.tasks["a"]).tasks) == ["b", "a", "c"]
    assert original == sample()


def test_a_newer_format_is_refused_as_such():
    with pytest.raises(BundleVersionError, match=r"zoo/manifest\.json: format version 4"):
        read({**sample().to_fields(), "format_version": 4})


@pytest.mark.parametrize(
    "name", ["..", "../up", "a/b", "/etc", "", ".hidden", "a\n", "a\x00b", "é", "a" * 65, "C:x", "a\\b"], ids=repr
)
def test_a_task_name_cannot_lead_out_of_the_bundle(name: str):
    fields = sample().to_fields()
    fields["tasks"][name] = fields["tasks"].pop("a")
    with pytest.raises(BundleCorruptError, match=r"zoo/manifest\.json"):
        read(fields)


@pytest.mark.parametrize(
    "file", ["../model.onnx", "/model.onnx", "a/model.onnx", "", ".", "..", "model.bin", "manifest.json"], ids=repr
)
def test_the_graph_file_cannot_lead_out_of_the_bundle(file: str):
    fields = sample().to_fields()
    fields["graph"]["file"] = file
    with pytest.raises(BundleCorruptError, match=r"zoo/manifest\.json"):
        read(fields)


@pytest.mark.parametrize("file", ["a\x00.onnx", "a" * 300 + ".onnx", "\ud800.onnx"], ids=["null", "long", "surrogate"])
def test_a_graph_file_that_no_file_system_holds_is_refused(file: str):
    fields = sample().to_fields()
    fields["graph"]["file"] = file
    with pytest.raises(BundleCorruptError, match=r"zoo/manifest\.json"):
        read(fields)


def test_a_served_version_must_be_listed():
    fields = sample().to_fields()
    fields["tasks"]["b"]["version"] = 3
    with pytest.raises(BundleCorruptError, match="version 3 is served but not listed"):
        read(fields)


@pytest.mark.parametrize(
    "version", ["one", "1.0", "", "-1", "0", "01", "1_0", " 1", "²", "9" * 5000], ids=lambda v: v[:8]
)
def test_versions_are_plain_positive_numbers(version: str):
    fields = sample().to_fields()
    fields["tasks"]["b"]["files"][version] = FILES
    with pytest.raises(BundleCorruptError, match="versions should be numbers"):
        read(fields)
