import io
import subprocess
import sys

import datasets
import huggingface_hub
import numpy as np
import pytest
from PIL import Image

from vpdeploy.errors import InputError, MissingExtraError, SpecError
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy_train.data import ImageDataset, preload_images, resolve_data

PREPROCESSING = Preprocessing(image_size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
NAMES = datasets.ClassLabel(names=["zebra", "ant"])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def png(shade):
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def table(labels, kind=NAMES, first=0, **columns):
    """Return a table with an image of shade ``first + row`` in each row."""
    images = [{"bytes": png(first + row), "path": None} for row in range(len(labels))]
    features = {"image": datasets.Image(), "label": kind}
    features |= {name: feature for name, (feature, _) in columns.items()}
    values = {name: value for name, (_, value) in columns.items()}
    return datasets.Dataset.from_dict({"image": images, "label": labels, **values}, datasets.Features(features))


def save(path, **splits):
    datasets.DatasetDict(splits).save_to_disk(path)
    return f"hf:{path}"


def resolve(spec, **options):
    return resolve_data(spec, seed=0, **options)


def content(source, examples):
    dataset = ImageDataset(examples, PREPROCESSING)
    return [(int(dataset[index][0][0, 0, 0]), source.labels[dataset[index][1]]) for index in range(len(dataset))]


def test_a_saved_data_set_has_its_splits_and_its_class_names_in_their_order(tmp_path):
    spec = save(tmp_path / "d", train=table([0, 1, 1]), validation=table([1], first=50), test=table([0, 0], first=90))
    source = resolve(spec)
    assert source.labels == ("zebra", "ant")
    assert content(source, source.train) == [(0, "zebra"), (1, "ant"), (2, "ant")]
    assert content(source, source.val) == [(50, "ant")]
    assert content(source, source.test) == [(90, "zebra"), (91, "zebra")]
    assert source.augmentation == "crop-flip"


def test_a_folder_of_parquet_files_is_read(tmp_path):
    (tmp_path / "d").mkdir()
    for split, labels in {"train": [0, 1], "test": [1]}.items():
        table(labels * 4).to_parquet(tmp_path / "d" / f"{split}-00000.parquet")
    source = resolve(f"hf:{tmp_path / 'd'}", val_fraction=0.25)
    assert [len(source.split(split)) for split in ("train", "val", "test")] == [6, 2, 4]
    assert source.labels == ("zebra", "ant")


def test_a_parquet_file_is_a_training_split_alone(tmp_path):
    table([0, 1] * 4).to_parquet(tmp_path / "d.parquet")
    source = resolve(f"hf:{tmp_path / 'd.parquet'}", val_fraction=0.25)
    assert [len(part) for part in (source.train, source.val, source.test)] == [4, 2, 2]


def test_one_saved_table_is_divided(tmp_path):
    table([0, 1] * 10).save_to_disk(tmp_path / "d")
    source = resolve(f"hf:{tmp_path / 'd'}")
    assert [len(part) for part in (source.train, source.val, source.test)] == [12, 4, 4]


@pytest.mark.parametrize(
    ("kind", "labels", "names"),
    [
        (datasets.Value("string"), ["cat", "ant", "cat"], ("ant", "cat")),
        (datasets.Value("int64"), [10, 9, 10], ("9", "10")),
    ],
)
def test_labels_without_class_names_are_sorted(tmp_path, kind, labels, names):
    source = resolve(save(tmp_path / "d", train=table(labels, kind), validation=table(labels, kind)))
    assert source.labels == names
    assert [source.labels[example.label] for example in source.train] == [str(label) for label in labels]


def test_one_of_several_label_columns_has_to_be_named(tmp_path):
    def two(labels):
        return table(labels, coarse=(NAMES, [1, 0, 0])).rename_column("label", "fine")

    spec = save(tmp_path / "d", train=two([0, 1, 1]), validation=two([0, 1, 1]))
    with pytest.raises(SpecError, match=r"several label columns, fine, coarse: choose one with \?label=fine"):
        resolve(spec)
    assert [example.label for example in resolve(f"{spec}?label=coarse").train] == [1, 0, 0]
    assert [example.label for example in resolve(f"{spec}?label=fine#final").train] == [0, 1, 1, 0, 1, 1]
    with pytest.raises(SpecError, match="'other' is no label column; choose one of: fine, coarse"):
        resolve(f"{spec}?label=other")
    with pytest.raises(SpecError, match="unknown option 'lable'"):
        resolve(f"{spec}?lable=fine")


@pytest.mark.parametrize("column", ["image", "label"])
def test_a_data_set_without_images_or_labels_is_refused(tmp_path, column):
    spec = save(tmp_path / "d", train=table([0, 1]).remove_columns(column))
    with pytest.raises(SpecError, match=f"no {column} column"):
        resolve(spec)


def test_a_test_split_without_labels_is_left_out(tmp_path, caplog):
    spec = save(tmp_path / "d", train=table([0, 1]), validation=table([0, 1]), test=table([-1, -1]))
    assert resolve(spec).test == ()
    assert "split 'test' has no labels and is left out" in caplog.text


def test_a_training_row_without_a_label_is_refused_by_its_number(tmp_path):
    with pytest.raises(SpecError, match="train, row 1 has no label"):
        resolve(save(tmp_path / "d", train=table([0, -1, 1])))


def test_splits_of_other_names_are_left_out(tmp_path, caplog):
    spec = save(tmp_path / "d", train=table([0, 1]), validation=table([0, 1]), unlabelled=table([-1]))
    assert len(resolve(spec).train) == 2
    assert "split 'unlabelled' is left out" in caplog.text
    with pytest.raises(SpecError, match=r"no images in splits called train, .*; found extra"):
        resolve(save(tmp_path / "e", extra=table([0, 1])))


def test_a_damaged_image_is_named_by_its_row(tmp_path):
    rows = {"image": [{"bytes": png(0), "path": None}, {"bytes": b"no image", "path": None}], "label": [0, 1]}
    broken = datasets.Dataset.from_dict(rows, datasets.Features({"image": datasets.Image(), "label": NAMES}))
    source = resolve(save(tmp_path / "d", train=broken, validation=table([0, 1])))
    with pytest.raises(InputError, match=r"1 of 2 images .*hf:.*, train, row 1: not a readable image"):
        preload_images([ImageDataset(source.train, PREPROCESSING)])


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("name", ["none/of-that-name", "none/of-that-name:config", ""])
def test_what_cannot_be_loaded_is_refused_in_one_line(monkeypatch, name):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(SpecError, match=r"^hf:") as caught:
        resolve(f"hf:{name}")
    assert "\n" not in str(caught.value)


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"'datasets' is not installed: pip install 'vpdeploy\[hf\]'"):
        resolve("hf:beans")


def test_other_data_does_not_import_it():
    program = "import sys; from vpdeploy_train.data import resolve_data; resolve_data('digits', seed=0)"
    subprocess.run([sys.executable, "-c", f"{program}; assert 'datasets' not in sys.modules"], check=True)


def test_a_hub_that_cannot_be_reached_is_asked_once_and_the_cache_alone_after_it(monkeypatch):
    asked: list[str] = []
    offline: list[bool] = []

    def refuse(url: str, **_: object) -> None:
        asked.append(url)
        raise ConnectionError("no route to host")

    def load(*_: object) -> None:
        offline.append(huggingface_hub.constants.HF_HUB_OFFLINE)
        raise ConnectionError("Couldn't reach 'some/data' on the Hub")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(SpecError, match=r"hf:some/data: is not in the local cache .*reached: no route to host"):
        resolve_data("hf:some/data", seed=0)
    assert (len(asked), offline) == (1, [True])
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
