"""Damaged images: refused with the option that leaves them out, or left out with a count and a list."""

import json
import shutil

import pytest
from PIL import Image
from train.toys import TOY
from typer.testing import CliRunner

from vpdeploy.cli.main import build_app
from vpdeploy.errors import InputError, SpecError
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy_train import Run, TrainSettings, evaluate_run, train_run
from vpdeploy_train.data import ImageDataset, resolve_data
from vpdeploy_train.data.preload import preload_sound_images


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch):
    monkeypatch.setattr("vpdeploy_train.training.plot_curves", lambda history, path: path.touch())


@pytest.fixture
def photos(colours, tmp_path):
    return shutil.copytree(colours, tmp_path / "photos")


@pytest.fixture
def settings(photos, toy_weights):
    return TrainSettings.of(
        **{"data": str(photos), "method": "vpt-deep", "prompt_tokens": 2, "prune": False, "augment": "none"},
        **{"backbone": TOY, "weights": str(toy_weights), "epochs": 2, "batch_size": 16, "device": "cpu"},
        skip_corrupt=True,
    )


def examples(settings, split):
    return resolve_data(settings.data, seed=settings.seed).split(split)


def damage(settings, split, count, how=lambda path: path.write_bytes(b"")):
    """Damage the first images of a split."""
    damaged = [example.source for example in examples(settings, split)[:count]]
    for path in damaged:
        how(path)
    return damaged


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize("how", [truncate, lambda path: path.write_bytes(b""), lambda path: path.write_text("hello")])
def test_a_damaged_image_ends_the_training_with_the_option_named(settings, tmp_path, how):
    (path,) = damage(settings, "train", 1, how)
    with pytest.raises(InputError, match=rf"1 of 33 images cannot be used: .*--skip-corrupt: .*{path.name}"):
        train_run(settings.changed(skip_corrupt=False), tmp_path / "run")


def test_damaged_images_are_left_out_with_a_count_and_a_list(settings, tmp_path, caplog):
    splits = {split: [each.source for each in examples(settings, split)] for split in ("train", "val", "test")}
    damaged = [*damage(settings, "train", 4, truncate), *damage(settings, "val", 1)]
    with caplog.at_level("WARNING", "vpdeploy.train"):
        result = train_run(settings, tmp_path / "run")
    assert result.run.card.details["images"] == {"train": 23, "val": 5, "test": 9}
    assert result.run.card.details["data"]["skipped"] == 5
    told = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("5 damaged images are left out: ")
    assert told[0].endswith("; and 2 more")
    listed = (tmp_path / "run" / "skipped.txt").read_text().splitlines()
    assert [line.partition(": ")[0] for line in listed] == [str(path) for path in damaged]
    again = {split: [each.source for each in examples(settings, split)] for split in ("train", "val", "test")}
    assert again == splits  # the splits are drawn before anything is left out


def test_a_run_without_damaged_images_has_no_list(settings, tmp_path):
    assert train_run(settings, tmp_path / "run").run.card.details["data"]["skipped"] == 0
    assert not (tmp_path / "run" / "skipped.txt").exists()


def test_a_resumed_run_that_leaves_images_out_ends_with_the_same_bytes(settings, tmp_path):
    class Stop(Exception):
        pass

    def stop(row):
        raise Stop

    damage(settings, "train", 2)
    train_run(settings, tmp_path / "whole", name="photos")
    with pytest.raises(Stop):
        train_run(settings, tmp_path / "resumed", name="photos", watch=stop)
    assert (tmp_path / "resumed" / "skipped.txt").is_file()
    train_run(settings, tmp_path / "resumed", name="photos", resume=True)
    for name in ("prompts.safetensors", "task.json", "args.toml", "skipped.txt"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_resume_on_images_that_were_repaired_or_damaged_since_is_refused(settings, tmp_path):
    train_run(settings, tmp_path / "run")
    damage(settings, "train", 1)
    with pytest.raises(SpecError, match=r"0 damaged images were left out when the run began, now it would be 1"):
        train_run(settings, tmp_path / "run", resume=True)


def test_a_resume_that_would_leave_other_images_out_is_refused(settings, tmp_path):
    first, second = (example.source for example in examples(settings, "train")[:2])
    sound = first.read_bytes()
    first.write_bytes(b"")
    train_run(settings, tmp_path / "run")
    first.write_bytes(sound)
    second.write_bytes(b"")
    with pytest.raises(
        SpecError, match=r"1 damaged images were left out when .* now it would be 1, others than in skip"
    ):
        train_run(settings, tmp_path / "run", resume=True)


def test_a_file_that_may_not_be_read_is_a_damaged_image(settings, tmp_path, monkeypatch):
    path = examples(settings, "train")[0].source
    opened = Image.open

    def refuse(source, *arguments, **options):
        if source == path:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(source, *arguments, **options)

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(InputError, match=rf"{path.name}: may not be read: check its permissions"):
        train_run(settings.changed(skip_corrupt=False), tmp_path / "run")
    assert train_run(settings, tmp_path / "run").run.card.details["data"]["skipped"] == 1


def test_a_link_that_leads_nowhere_is_refused_even_so(settings, tmp_path):
    path = examples(settings, "train")[0].source
    path.unlink()
    path.symlink_to("nothing.png")
    with pytest.raises(SpecError, match="the symbolic link leads nowhere: restore its target or remove it"):
        train_run(settings, tmp_path / "run")


def test_a_folder_that_is_called_like_an_image_is_a_folder(settings, photos):
    image = examples(settings, "train")[0].source
    (photos / "red" / "more.jpg").mkdir()
    image.rename(photos / "red" / "more.jpg" / "x.png")
    assert sum(len(examples(settings, split)) for split in ("train", "val", "test")) == 42


def test_a_class_that_loses_all_training_images_is_an_error(settings, tmp_path):
    red = [each.source for each in examples(settings, "train") if each.source.parent.name == "red"]
    for path in red:
        path.write_bytes(b"")
    with pytest.raises(InputError, match="all training images of class 'red' are damaged"):
        train_run(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_losing_everything_or_all_validation_images_is_an_error(settings, tmp_path):
    damage(settings, "val", None)
    with pytest.raises(InputError, match="all validation images are damaged"):
        train_run(settings, tmp_path / "run")
    damage(settings, "train", None)
    with pytest.raises(InputError, match=r"all training images of class 'blue' \(and of 2 more classes\) are damaged"):
        train_run(settings, tmp_path / "run")


def test_eval_leaves_damaged_images_out_on_demand(settings, tmp_path):
    train_run(settings, tmp_path / "run")
    whole = evaluate_run(Run.read(tmp_path / "run"))
    assert (whole.skipped, whole.to_json()["skipped"]) == (0, 0)
    damage(settings, "test", 2)
    with pytest.raises(InputError, match=r"2 of 9 images cannot be used: .*--skip-corrupt"):
        evaluate_run(Run.read(tmp_path / "run"))
    command = ["eval", str(tmp_path / "run"), "--skip-corrupt"]
    assert "7 images of split 'test', 2 damaged ones left out" in CliRunner().invoke(build_app(command), command).stdout
    found = json.loads(CliRunner().invoke(build_app(command), [*command, "--json"]).stdout)
    assert (found["images"], found["skipped"]) == (7, 2)
    damage(settings, "test", None)
    with pytest.raises(InputError, match="all 9 images are damaged"):
        evaluate_run(Run.read(tmp_path / "run"), skip_corrupt=True)


def test_what_is_kept_of_sound_images_stays_kept(settings, decoded):
    damage(settings, "train", 2)
    parts = examples(settings, "train")
    preprocessing = Preprocessing(image_size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    (sound,), damaged = preload_sound_images([ImageDataset(parts, preprocessing)])
    assert ([each.index for each in damaged], len(sound), sound.kept) == ([0, 1], 25, 25)
    before = len(decoded)
    assert [sound[index][1] for index in range(25)] == [example.label for example in parts[2:]]
    assert len(decoded) == before
