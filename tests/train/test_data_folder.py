import logging
import os
import unicodedata
from contextlib import nullcontext
from pathlib import Path

import pytest
from PIL import Image

from vpdeploy.errors import SpecError
from vpdeploy_train.data import resolve_data


def put(path, colour=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(path)


@pytest.fixture
def split_folder(tmp_path):
    for split, count in {"train": 5, "val": 2, "test": 3}.items():
        for name in ("cat", "dog"):
            for number in range(count):
                put(tmp_path / split / name / f"{number}.png")
    return tmp_path


@pytest.fixture
def plain_folder(tmp_path):
    for name in ("cat", "dog"):
        for number in range(10):
            put(tmp_path / name / f"{number}.png")
    return tmp_path


def sizes(source):
    return len(source.train), len(source.val), len(source.test)


def test_split_folders_are_the_splits(split_folder):
    source = resolve_data(str(split_folder), seed=0)
    assert source.labels == ("cat", "dog")
    assert sizes(source) == (10, 4, 6)
    assert source.augmentation == "crop-flip"
    for split in ("train", "val", "test"):
        for example in source.split(split):
            assert example.source.parts[-3:-1] == (split, source.labels[example.label])


@pytest.mark.parametrize("name", ["valid", "validation", "Val", "dev", "VALIDATION"])
def test_the_validation_folder_may_be_spelled_otherwise(split_folder, name):
    (split_folder / "val").rename(split_folder / name)
    assert sizes(resolve_data(str(split_folder), seed=0)) == (10, 4, 6)


@pytest.mark.parametrize(("train", "test"), [("training", "testing"), ("TRAIN", "TEST"), ("Training", "test")])
def test_the_training_and_test_folders_may_be_spelled_otherwise(split_folder, train, test):
    (split_folder / "train").rename(split_folder / train)
    (split_folder / "test").rename(split_folder / test)
    source = resolve_data(str(split_folder), seed=0)
    assert (source.labels, sizes(source)) == (("cat", "dog"), (10, 4, 6))


def test_two_validation_folders_are_refused(split_folder):
    put(split_folder / "valid" / "cat" / "x.png")
    with pytest.raises(SpecError, match="two folders for the split 'val'"):
        resolve_data(str(split_folder), seed=0)


def test_a_folder_beside_the_splits_is_refused(split_folder):
    put(split_folder / "extra" / "cat" / "x.png")
    with pytest.raises(SpecError, match="unexpected folder 'extra' beside the split folders"):
        resolve_data(str(split_folder), seed=0)


def test_a_class_may_be_called_train(plain_folder):
    for number in range(10):
        put(plain_folder / "train" / f"{number}.png")
    assert resolve_data(str(plain_folder), seed=0).labels == ("cat", "dog", "train")


def test_images_lie_at_any_depth_of_a_class_folder(plain_folder):
    put(plain_folder / "cat" / "more" / "deep" / "x.JPEG")
    assert sum(sizes(resolve_data(str(plain_folder), seed=0))) == 21


def test_classes_are_in_natural_order(tmp_path):
    for name in ("class10", "class9", "Class1"):
        for number in range(3):
            put(tmp_path / name / f"{number}.png")
    assert resolve_data(str(tmp_path), seed=0).labels == ("Class1", "class9", "class10")


def test_the_order_of_the_file_system_does_not_matter(plain_folder, monkeypatch):
    before = resolve_data(str(plain_folder), seed=0)
    listing = os.scandir

    def backwards(path):
        with listing(path) as entries:
            return nullcontext(sorted(entries, key=lambda entry: entry.name, reverse=True))

    monkeypatch.setattr("vpdeploy.tree.os.scandir", backwards)
    after = resolve_data(str(plain_folder), seed=0)
    for split in ("train", "val", "test"):
        assert [e.source for e in before.split(split)] == [e.source for e in after.split(split)]


def test_a_missing_folder_is_refused_with_the_formats(tmp_path):
    with pytest.raises(SpecError, match=r"no file or folder there.*DIR, FILE\.csv.*shapes:TASK, digits"):
        resolve_data(str(tmp_path / "none"), seed=0)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(SpecError, match="no class folders; expected"):
        resolve_data(str(tmp_path), seed=0)


def test_images_without_class_folders_are_refused(tmp_path):
    put(tmp_path / "x.png")
    with pytest.raises(SpecError, match="images but no class folders"):
        resolve_data(str(tmp_path), seed=0)


def test_a_split_folder_without_class_folders_is_refused(tmp_path):
    put(tmp_path / "train" / "x.png")
    with pytest.raises(SpecError, match="'train' holds no class folders"):
        resolve_data(str(tmp_path), seed=0)


def test_an_empty_class_folder_is_refused(split_folder):
    (split_folder / "train" / "emu").mkdir()
    with pytest.raises(SpecError, match=r"train/emu: the class folder holds no images"):
        resolve_data(str(split_folder), seed=0)


def test_a_class_may_be_absent_from_the_test_split(split_folder):
    for file in (split_folder / "test" / "cat").iterdir():
        file.unlink()
    assert {example.label for example in resolve_data(str(split_folder), seed=0).test} == {1}


def test_a_single_class_is_refused(tmp_path):
    for number in range(5):
        put(tmp_path / "cat" / f"{number}.png")
    with pytest.raises(SpecError, match="the one class 'cat'; expected at least two"):
        resolve_data(str(tmp_path), seed=0)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_class_that_train_has_not_is_refused(split_folder, split):
    put(split_folder / split / "emu" / "x.png")
    with pytest.raises(SpecError, match=f"split '{split}' holds images of 'emu'.* 2 classes that train has"):
        resolve_data(str(split_folder), seed=0)


def test_a_folder_without_train_is_refused_unless_labels_are_given(split_folder):
    for split in ("train", "val"):
        (split_folder / split).rename(split_folder.with_name(f"{split_folder.name}-{split}"))
    with pytest.raises(SpecError, match="no training images; expected a train split, found test"):
        resolve_data(str(split_folder), seed=0)
    source = resolve_data(str(split_folder), seed=0, labels=["emu", "dog", "cat"])
    assert sizes(source) == (0, 0, 6)
    assert sorted({example.label for example in source.test}) == [1, 2]


def test_other_files_are_counted_in_one_warning(plain_folder, caplog):
    (plain_folder / "notes.txt").touch()
    (plain_folder / "cat" / "labels.xml").touch()
    with caplog.at_level(logging.WARNING):
        source = resolve_data(str(plain_folder), seed=0)
    assert len(caplog.records) == 1
    assert "2 files that are not images" in caplog.text
    assert sum(sizes(source)) == 20


def test_hidden_files_are_passed_over_silently(plain_folder, caplog):
    put(plain_folder / "cat" / "._0.png")
    put(plain_folder / ".git" / "x.png")
    (plain_folder / "cat" / "Thumbs.db").touch()
    with caplog.at_level(logging.DEBUG):
        source = resolve_data(str(plain_folder), seed=0)
    assert not caplog.records
    assert source.labels == ("cat", "dog")
    assert sum(sizes(source)) == 20


def test_a_symbolic_link_to_a_folder_is_followed(plain_folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for number in range(3):
        put(elsewhere / f"{number}.png")
    (plain_folder / "emu").symlink_to(elsewhere)
    assert resolve_data(str(plain_folder), seed=0).labels == ("cat", "dog", "emu")


@pytest.mark.parametrize("above", ["cat", ".", ".."])
def test_a_symbolic_link_to_a_folder_above_is_refused(plain_folder, above):
    (plain_folder / "cat" / "loop").symlink_to(plain_folder / above)
    with pytest.raises(SpecError, match="cat/loop: the symbolic link leads back"):
        resolve_data(str(plain_folder), seed=0)


def test_symbolic_links_in_a_circle_are_refused(plain_folder):
    (plain_folder / "cat" / "a.png").symlink_to(plain_folder / "cat" / "b.png")
    (plain_folder / "cat" / "b.png").symlink_to(plain_folder / "cat" / "a.png")
    with pytest.raises(SpecError, match=r"\.png: the symbolic link leads nowhere"):
        resolve_data(str(plain_folder), seed=0)


def test_files_are_told_from_folders_without_a_look_at_each(plain_folder, monkeypatch):
    looked_at = []
    stat = Path.stat

    def note(path, **options):
        looked_at.append(path.name)
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", note)
    resolve_data(str(plain_folder), seed=0)
    assert not [name for name in looked_at if name.endswith((".jpg", ".png"))]


def test_an_unreadable_folder_is_refused_by_name(plain_folder, monkeypatch):
    listing = os.scandir

    def refuse(path):
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr("vpdeploy.tree.os.scandir", refuse)
    with pytest.raises(SpecError, match=r"dog: the folder cannot be read \(Permission denied\)"):
        resolve_data(str(plain_folder), seed=0)


def test_a_thousand_classes_are_fine(tmp_path):
    for number in range(1000):
        folder = tmp_path / f"c{number}"
        folder.mkdir()
        for file in ("a.png", "b.png", "c.png"):
            (folder / file).touch()
    source = resolve_data(str(tmp_path), seed=0)
    assert sizes(source) == (1000, 1000, 1000)
    assert source.labels[999] == "c999"


def fill(root, *names, images=5):
    for name in names:
        for number in range(images):
            put(root / name / f"{number}.png")


@pytest.mark.parametrize(
    ("first", "second"),
    [("train2017", "val2017"), ("train_set", "test_set"), ("images-train", "images-test"), ("train_images", "eval")],
)
@pytest.mark.parametrize("classes", [("cat", "dog"), ("",)])
def test_folders_that_look_like_splits_are_a_question(tmp_path, first, second, classes):
    for split in (first, second):
        fill(tmp_path / split, *classes)
    with pytest.raises(
        SpecError, match="look like splits, but would be classes: call them train, val or test; "
    ) as told:
        resolve_data(str(tmp_path), seed=0)
    assert f"'{first}'" in str(told.value)
    assert f"'{second}'" in str(told.value)
    assert "in a manifest FILE.csv" in str(told.value)


def test_something_like_a_split_beside_the_splits_is_a_question(split_folder):
    (split_folder / "test").rename(split_folder / "test_set")
    with pytest.raises(
        SpecError, match=r"'test_set' beside the split folders train, val: .*call it train, val or test"
    ):
        resolve_data(str(split_folder), seed=0)


def test_classes_may_have_names_like_splits(tmp_path):
    fill(tmp_path, "train_station", "test tube", "valley", "trainer", "testing")
    fill(tmp_path / "train_station", "old", "new")
    fill(tmp_path / "test tube", "glass")
    assert len(resolve_data(str(tmp_path), seed=0).labels) == 5


def test_classes_that_look_like_one_and_the_same_split_are_classes(tmp_path):
    fill(tmp_path, "test-positive", "test-negative")
    assert resolve_data(str(tmp_path), seed=0).labels == ("test-negative", "test-positive")


def test_splits_below_the_classes_are_a_question(tmp_path):
    for name in ("cat", "dog"):
        fill(tmp_path / name, "train", "test")
    with pytest.raises(SpecError, match="the class folders hold split folders, which would be mixed: move the splits"):
        resolve_data(str(tmp_path), seed=0)


def test_a_folder_around_the_data_is_named(tmp_path):
    fill(tmp_path / "archive", "cat", "dog")
    with pytest.raises(SpecError, match=r"the one folder 'archive', with 2 folders in it.* did you mean .*/archive"):
        resolve_data(str(tmp_path), seed=0)


def test_what_a_mac_leaves_in_an_archive_is_passed_over(split_folder, caplog):
    put(split_folder / "__MACOSX" / "train" / "cat" / "._0.png")
    assert sizes(resolve_data(str(split_folder), seed=0)) == (10, 4, 6)
    assert not caplog.records


def test_a_class_may_be_composed_in_train_and_decomposed_in_val(tmp_path):
    composed, decomposed = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")
    assert composed != decomposed
    fill(tmp_path / "train", composed, "tea")
    fill(tmp_path / "val", decomposed, "tea")
    source = resolve_data(str(tmp_path), seed=0)
    assert (source.labels, sizes(source)) == ((composed, "tea"), (10, 10, 0))
    assert len(resolve_data(str(tmp_path), seed=0, labels=[decomposed, "tea"]).val) == 10


def test_classes_that_differ_in_case_alone_are_warned_of(tmp_path, caplog):
    fill(tmp_path, "Cat", "cat", "dog")
    assert len(resolve_data(str(tmp_path), seed=0).labels) == 3
    assert "classes 'Cat' and 'cat' differ in upper and lower case alone" in caplog.text


def test_a_class_of_val_that_differs_in_case_from_trains_is_named_with_it(tmp_path):
    fill(tmp_path / "train", "Cat", "dog")
    fill(tmp_path / "val", "cat", "dog")
    with pytest.raises(SpecError, match=r"images of 'cat' \(not 'Cat': upper and lower case count\)"):
        resolve_data(str(tmp_path), seed=0)


def test_odd_class_names_are_names(tmp_path):
    names = ["ünï 🌹", "-first", "a, b", "two\nlines", "'quoted'", "#final", "x.jpg"]
    fill(tmp_path, *names)
    assert sorted(resolve_data(str(tmp_path), seed=0).labels) == sorted(names)
