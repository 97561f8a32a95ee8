import json
import logging

import pytest

from vpdeploy.errors import SpecError
from vpdeploy_train.data import resolve_data

ROWS = [
    (f"images/{name}{number}.png", name, split)
    for split, numbers in {"train": range(5), "val": range(5, 7), "test": range(7, 10)}.items()
    for number in numbers
    for name in ("cat", "dog")
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for path, _, _ in ROWS:
        (tmp_path / path).touch()
    return tmp_path


def csv_text(rows, header="path,label,split"):
    return "\n".join([header, *[",".join(row) for row in rows]]) + "\n"


def resolve(folder, text, name="data.csv"):
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return resolve_data(str(file), seed=0)


def sizes(source):
    return len(source.train), len(source.val), len(source.test)


def check_rows(source, folder):
    found = {
        (str(example.source.relative_to(folder)), source.labels[example.label], split)
        for split in ("train", "val", "test")
        for example in source.split(split)
    }
    assert found == set(ROWS)


def test_csv(folder):
    check_rows(resolve(folder, csv_text(ROWS)), folder)


def test_json_list(folder):
    entries = [{"path": path, "label": label, "split": split} for path, label, split in ROWS]
    check_rows(resolve(folder, json.dumps(entries), "data.json"), folder)


def test_jsonl(folder):
    lines = [json.dumps({"path": path, "label": label, "split": split}) for path, label, split in ROWS]
    check_rows(resolve(folder, "\n".join(lines) + "\n\n", "data.jsonl"), folder)


def test_flat_json_is_divided(folder):
    source = resolve(folder, json.dumps({path: label for path, label, _ in ROWS}), "data.json")
    assert source.labels == ("cat", "dog")
    assert sizes(source) == (12, 4, 4)


def test_whole_numbers_are_class_names_in_natural_order(folder):
    entries = {path: (10 if label == "dog" else 9) for path, label, _ in ROWS}
    assert resolve(folder, json.dumps(entries), "data.json").labels == ("9", "10")


def test_the_suffix_may_be_upper_case(folder):
    assert sizes(resolve(folder, csv_text(ROWS), "DATA.CSV")) == (10, 4, 6)


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_byte_order_mark_and_either_line_ending_are_fine(folder, ending):
    text = csv_text(ROWS).replace("\n", ending)
    check_rows(resolve(folder, b"\xef\xbb\xbf" + text.encode()), folder)


def test_quoted_fields_and_blank_lines_and_other_columns_are_fine(folder):
    (folder / "a, b.png").touch()
    text = csv_text([(*row, "x") for row in ROWS], "path,label,split,note") + '\n"a, b.png",cat,test,"y"\n,,,\n'
    assert sizes(resolve(folder, text)) == (10, 4, 7)


def test_absolute_paths_are_kept(folder):
    rows = [(str(folder / path), label, split) for path, label, split in ROWS]
    check_rows(resolve(folder, csv_text(rows)), folder)


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"none\.csv: file not found"):
        resolve_data(str(tmp_path / "none.csv"), seed=0)


@pytest.mark.parametrize(("name", "text"), [("a.csv", ""), ("a.csv", "image,class\na.png,cat\n")])
def test_another_header_is_refused(folder, name, text):
    with pytest.raises(SpecError, match=r"a\.csv: the header is .*; expected path,label"):
        resolve(folder, text, name)


@pytest.mark.parametrize(
    ("name", "text"), [("a.csv", "path,label\n"), ("a.json", "[]"), ("a.json", "{}"), ("a.jsonl", "\n")]
)
def test_a_manifest_without_rows_is_refused(folder, name, text):
    with pytest.raises(SpecError, match=f"{name}: no rows"):
        resolve(folder, text, name)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "path,label\n,cat\n", "line 2: no usable path"),
        ("a.csv", "path,label\nimages/cat0.png\n", "line 2: no usable label"),
        ("a.csv", "path,label\nimages/cat0.png,\n", "line 2: no usable label"),
        ("a.csv", "path,label\nimages/cat0.png,cat,dog\n", "line 2 has 3 fields; expected 2"),
        ("a.csv", 'path,label\n"images/cat0.png,cat\n', "is not CSV"),
        ("a.json", '[{"path": "images/cat0.png"}]', "entry 1: no usable label"),
        ("a.json", '[{"label": "cat"}]', "entry 1: no usable path"),
        ("a.json", '[{"path": "images/cat0.png", "label": 0.5}]', "entry 1: no usable label.*found 0.5"),
        ("a.json", '[{"path": "images/cat0.png", "label": true}]', "entry 1: no usable label.*found True"),
        ("a.json", '[{"path": 3, "label": "cat"}]', "entry 1: no usable path.*found 3"),
        ("a.json", '["images/cat0.png"]', "entry 1 is not an object"),
        ("a.json", '"images/cat0.png"', "expected a JSON list of objects or one object"),
        ("a.json", '[{"path": ', "is not JSON"),
        ("a.jsonl", '{"path": "images/cat0.png", "label": "cat"}\nnonsense', "line 2 is not JSON"),
        ("a.jsonl", "[1]", "line 1 is not an object"),
    ],
)
def test_an_incomplete_row_is_refused_by_place(folder, name, text, message):
    with pytest.raises(SpecError, match=f"{name}: .*{message}"):
        resolve(folder, text, name)


def test_an_unknown_split_is_refused(folder):
    rows = [*ROWS[:-1], (*ROWS[-1][:2], "holdout")]
    with pytest.raises(SpecError, match="line 21: unknown split 'holdout'; expected train, training, val"):
        resolve(folder, csv_text(rows))


def test_splits_have_the_names_that_folders_have(folder):
    other = {"train": "Training", "val": "dev", "test": "TESTING"}
    check_rows(resolve(folder, csv_text([(path, label, other[split]) for path, label, split in ROWS])), folder)


def test_a_split_in_only_some_rows_is_refused(folder):
    rows = [*ROWS[:-1], (*ROWS[-1][:2], "")]
    with pytest.raises(SpecError, match="line 21 and line 2 differ: expected a split in every row or in none"):
        resolve(folder, csv_text(rows))


def test_missing_files_are_counted_and_the_first_is_named(folder):
    (folder / ROWS[3][0]).unlink()
    (folder / ROWS[7][0]).unlink()
    with pytest.raises(SpecError, match=r"2 of 20 files are missing, the first is .*images/dog1\.png"):
        resolve(folder, csv_text(ROWS))


def test_a_path_too_long_for_the_system_is_a_missing_file(folder):
    with pytest.raises(SpecError, match="1 of 21 files are missing") as caught:
        resolve(folder, csv_text([*ROWS, ("x" * 5000, "cat", "train")]))
    assert len(str(caught.value)) < 600


def test_a_folder_is_not_an_image(folder):
    with pytest.raises(SpecError, match="1 of 21 files are missing"):
        resolve(folder, csv_text([*ROWS, ("images", "cat", "train")]))


def test_conflicting_labels_of_one_file_are_refused(folder):
    rows = [*ROWS, (f"./{ROWS[0][0]}", "dog", "train")]
    with pytest.raises(SpecError, match=r"cat0\.png is 'cat' in line 2 and 'dog' in line 22"):
        resolve(folder, csv_text(rows))


def test_conflicting_labels_in_flat_json_are_refused(folder):
    text = '{"images/cat0.png": "cat", "images/dog0.png": "dog", "images/cat0.png": "dog"}'
    with pytest.raises(SpecError, match="'cat' in entry 1 and 'dog' in entry 3"):
        resolve(folder, text, "data.json")


def test_one_file_in_two_splits_is_refused(folder):
    rows = [*ROWS, (ROWS[0][0], "cat", "test")]
    with pytest.raises(SpecError, match=r"in split 'train' \(line 2\) and in 'test' \(line 22\)"):
        resolve(folder, csv_text(rows))


def test_repeated_rows_are_dropped_with_one_warning(folder, caplog):
    with caplog.at_level(logging.WARNING):
        source = resolve(folder, csv_text([*ROWS, ROWS[0], ROWS[1]]))
    assert sizes(source) == (10, 4, 6)
    assert [record.getMessage()[:6] for record in caplog.records] == ["2 rows"]


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_what_spreadsheets_put_between_fields_is_fine(folder, delimiter):
    text = csv_text(ROWS).replace(",", delimiter).replace("\n", "\r\n")
    check_rows(resolve(folder, b"\xef\xbb\xbf" + text.encode()), folder)
    check_rows(resolve(folder, text.replace("path", '"path"').replace("label", '"label"')), folder)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_with_a_byte_order_mark_is_fine(folder, encoding):
    mark = {"utf-16": b"", "utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}[encoding]
    check_rows(resolve(folder, mark + csv_text(ROWS).encode(encoding)), folder)


def test_paths_as_windows_writes_them_are_fine(folder):
    rows = [(path.replace("/", "\\"), label, split) for path, label, split in ROWS]
    check_rows(resolve(folder, csv_text(rows)), folder)
    (folder / "back\\slash.png").touch()
    assert sizes(resolve(folder, csv_text([*ROWS, ("back\\slash.png", "cat", "train")]))) == (11, 4, 6)


def test_a_header_between_the_rows_is_passed_over(folder):
    lines = csv_text(ROWS).splitlines()
    check_rows(resolve(folder, "\n".join([*lines[:5], lines[0], *lines[5:]])), folder)


def test_a_column_that_the_header_names_twice_is_refused(folder):
    with pytest.raises(SpecError, match=r"data\.csv: the header names 'label' twice"):
        resolve(folder, "path,label,label\nimages/cat0.png,cat,dog\n")


@pytest.mark.parametrize("data", [b"\xff\xfep", b"\xfe\xff\xd8\x00\x00\x00"])
def test_damaged_utf_16_is_refused(folder, data):
    with pytest.raises(SpecError, match=r"data\.csv: not UTF-16"):
        resolve(folder, data)


@pytest.mark.parametrize("encoding", ["latin-1"])
def test_another_encoding_is_refused(folder, encoding):
    text = csv_text([("images/cat0.png", "käse", "train")])
    with pytest.raises(SpecError, match=r"data\.csv: not UTF-8"):
        resolve(folder, text.encode(encoding))


def test_a_label_that_train_has_not_is_refused(folder):
    rows = [*ROWS[:-1], (ROWS[-1][0], "emu", "test")]
    with pytest.raises(SpecError, match="split 'test' holds images of 'emu'"):
        resolve(folder, csv_text(rows))


def test_a_file_of_another_kind_is_refused_with_the_formats(tmp_path):
    file = tmp_path / "data.parquet"
    file.touch()
    with pytest.raises(SpecError, match=r"a file of another kind.*FILE\.csv.json.jsonl"):
        resolve_data(str(file), seed=0)
