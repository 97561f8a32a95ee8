from __future__ import annotations

import json
from pathlib import Path

import pytest

from vpdeploy.errors import BundleCorruptError, BundleVersionError
from vpdeploy.format.document import Document, to_json


def document(**fields: object) -> Document:
    return Document("card.json", fields)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "3", "null", '"text"', "[" * 100_000, '{"a": ' + "9" * 5000 + "}"],
    ids=["empty", "cut", "list", "number", "null", "text", "deep", "digits"],
)
def test_text_that_is_no_json_object_is_refused_by_name(text: str):
    with pytest.raises(BundleCorruptError, match=r"^card\.json: "):
        Document.parse(text, source="card.json")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    with pytest.raises(BundleCorruptError, match=r"none\.json: file is missing"):
        Document.read(tmp_path / "none.json")
    with pytest.raises(BundleCorruptError, match="cannot be read"):
        Document.read(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BundleCorruptError, match=r"binary\.json: cannot be read"):
        Document.read(tmp_path / "binary.json")


@pytest.mark.parametrize(
    ("value", "kind"),
    [("1", int), (1.0, int), (True, int), (True, float), (None, str), (1, bool), ([], dict), ({}, list), ("1", float)],
)
def test_a_field_of_another_type_is_refused_by_name(value: object, kind: type):
    with pytest.raises(BundleCorruptError, match=r"card\.json: field 'size' should be " + kind.__name__):
        document(size=value).take("size", kind)


def test_a_missing_field_is_named():
    with pytest.raises(BundleCorruptError, match="field 'size' is missing"):
        document().take("size", int)


def test_an_integer_serves_as_a_float():
    taken = document(ratio=1).take("ratio", float)
    assert (taken, type(taken)) == (1.0, float)
    assert document(mean=[1, 0.5]).take_list("mean", float) == [1.0, 0.5]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400])
def test_numbers_that_are_not_finite_are_refused(number: str):
    parsed = Document.parse(f'{{"ratio": {number}, "mean": [{number}]}}', source="card.json")
    with pytest.raises(BundleCorruptError, match="ratio"):
        parsed.take("ratio", float)
    with pytest.raises(BundleCorruptError, match=r"mean\[0\]"):
        parsed.take_list("mean", float)


@pytest.mark.parametrize("item", [None, "0.5", True, [0.5]])
def test_a_list_item_of_another_type_is_refused_by_its_index(item: object):
    with pytest.raises(BundleCorruptError, match=r"field 'mean\[1\]' should be float"):
        document(mean=[0.5, item]).take_list("mean", float)


def test_a_nested_document_names_its_place():
    with pytest.raises(BundleCorruptError, match=r"card\.json: graph: field 'file' is missing"):
        document(graph={}).nested("graph").take("file", str)


def test_another_format_and_another_version_are_told_apart():
    document(format="a", format_version=1).expect_format("a", 1)
    with pytest.raises(BundleCorruptError, match="expected format 'a', found 'b'"):
        document(format="b", format_version=1).expect_format("a", 1)
    with pytest.raises(BundleVersionError, match="version 2 is not readable, expected 1"):
        document(format="a", format_version=2).expect_format("a", 1)
    with pytest.raises(BundleCorruptError, match="format_version"):
        document(format="a", format_version=True).expect_format("a", 1)


def test_json_is_written_in_the_given_order_with_a_newline_at_the_end():
    assert to_json({"b": "é", "a": [1]}) == '{\n  "b": "é",\n  "a": [\n    1\n  ]\n}\n'
    assert json.loads(to_json({"x": 0.1})) == {"x": 0.1}


def test_numbers_that_json_does_not_know_are_not_written():
    with pytest.raises(ValueError, match="Out of range"):
        to_json({"loss": float("nan")})
