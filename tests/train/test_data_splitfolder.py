import json

import pytest

from vpdeploy.errors import SpecError
from vpdeploy_train.data import resolve_data

SPLITS = {
    "train": {"a/1.jpg": 7, "a/2.jpg": 7, "b/3.jpg": 12, "b/4.jpg": 12},
    "val": {"a/5.jpg": 7},
    "test": {"b/6.jpg": 12},
}


def write(folder, images="", splits=SPLITS):
    for split, entries in splits.items():
        (folder / f"{split}.json").write_text(json.dumps(entries))
        for path in entries:
            file = folder / images / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    return folder


def labelled(source, examples):
    return {example.source.name: source.labels[example.label] for example in examples}


@pytest.mark.parametrize("images", ["", "images", "Images"])
def test_each_file_is_a_split_and_images_lie_where_the_published_sets_have_them(tmp_path, images):
    source = resolve_data(str(write(tmp_path, images)), seed=0)
    assert source.labels == ("7", "12")
    assert labelled(source, source.train) == {"1.jpg": "7", "2.jpg": "7", "3.jpg": "12", "4.jpg": "12"}
    assert labelled(source, source.val) == {"5.jpg": "7"}
    assert labelled(source, source.test) == {"6.jpg": "12"}
    assert source.augmentation == "crop-flip"


def test_val_is_carved_where_there_is_none(tmp_path):
    source = resolve_data(str(write(tmp_path, splits={"train": SPLITS["train"]})), seed=0)
    assert (len(source.train), len(source.val), len(source.test)) == (2, 2, 0)


def test_the_final_training_has_train_and_val(tmp_path):
    source = resolve_data(f"{write(tmp_path)}#final", seed=0)
    assert (len(source.train), len(source.val), len(source.test)) == (5, 0, 1)


def test_a_missing_image_is_named(tmp_path):
    write(tmp_path)
    (tmp_path / "a" / "2.jpg").unlink()
    with pytest.raises(SpecError, match=r"1 of 6 files are missing, the first is .*a/2\.jpg"):
        resolve_data(str(tmp_path), seed=0)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("val.json", "[", r"val\.json: the manifest is not JSON"),
        ("val.json", '{"a/5.jpg": 0.5}', r"val\.json: entry 1: no usable label"),
        ("test.json", '{"a/1.jpg": 7}', r"a/1\.jpg is in split 'train' \(train\.json, entry 1\) and in 'test'"),
        ("train.json", "{}", "no training images"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, name, text, message):
    write(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(SpecError, match=message) as caught:
        resolve_data(str(tmp_path), seed=0)
    assert str(caught.value).startswith(str(tmp_path))


def test_class_folders_win_over_a_file_beside_them(tmp_path):
    write(tmp_path)
    for name in ("cat", "dog"):
        for number in range(3):
            (tmp_path / "train" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "train" / name / f"{number}.jpg").touch()
    with pytest.raises(SpecError, match="unexpected folder 'a' beside the split folders"):
        resolve_data(str(tmp_path), seed=0)
