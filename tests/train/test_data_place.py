"""Where data lie: a run finds its data from every directory, and one spelling is as good as another."""

import json
import shutil
from pathlib import Path

import pytest
from train.toys import TOY

from vpdeploy.errors import SpecError
from vpdeploy_export.images import gate_images
from vpdeploy_train import Run, TrainSettings, evaluate_run, train_run
from vpdeploy_train.config import read_toml
from vpdeploy_train.data.resolve import FORMATS, absolute_spec, is_same_data, missing_data


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch):
    monkeypatch.setattr("vpdeploy_train.training.plot_curves", lambda history, path: path.touch())


@pytest.fixture
def here(tmp_path, monkeypatch, colours):
    """The directory of a training, with a folder of photos in it."""
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(colours, tmp_path / "here" / "photos")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def settings_for(data, weights, **more):
    return TrainSettings.of(
        **{"data": data, "method": "vpt-deep", "prompt_tokens": 2, "prune": False, "augment": "none"},
        **{"backbone": TOY, "weights": str(weights), "epochs": 1, "batch_size": 16, "device": "cpu"} | more,
    )


@pytest.fixture
def run(here, toy_weights):
    """A run of relative data and weights, from the directory of the training."""
    shutil.copyfile(toy_weights, here / "toy.safetensors")
    return train_run(settings_for("photos", "toy.safetensors"), here / "run").run


def make_old(run, spec="photos"):
    """Let a run look as if an earlier version had written it: with relative data."""
    for name, old in (("task.json", json.dumps(run.data)), ("args.toml", f'data = "{run.data}"')):
        text = (run.path / name).read_text()
        assert old in text
        (run.path / name).write_text(text.replace(old, old.replace(run.data, spec)))


@pytest.mark.parametrize("after", ["", "#final"])
def test_every_format_says_how_its_spec_is_made_absolute(here, after):
    (here / "flat").mkdir()
    (here / "flat" / "train.json").write_text("{}")
    (here / "x.csv").touch()
    specs = {
        **{"digits": "digits", "shapes:count": "shapes:count", "hf:beans": "hf:beans", "hf:a/b:c": "hf:a/b:c"},
        **{"vtab:photos": f"vtab:{here}/photos", "x.csv": f"{here}/x.csv", "flat": f"{here}/flat"},
        **{"hf:photos": f"hf:{here}/photos", "hf:photos?image=x": f"hf:{here}/photos?image=x"},
        **{"photos": f"{here}/photos", "./photos/": f"{here}/photos", "../here/photos": f"{here}/photos"},
    }
    for spec, absolute in specs.items():
        assert absolute_spec(spec + after) == absolute + after
        assert absolute_spec(absolute + after) == absolute + after
    assert len(FORMATS) == 7


def test_a_home_directory_is_made_absolute(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    assert absolute_spec("~/photos#final") == f"{here}/photos#final"


def test_two_dots_behind_a_symbolic_link_lead_where_the_system_leads(here):
    Path("link").symlink_to("photos/red")
    assert Path(absolute_spec("link/../blue")).resolve() == here / "photos" / "blue"


def test_a_manifest_that_is_a_symbolic_link_keeps_its_own_folder(here):
    Path("list.csv").write_text("path,label\n")
    Path("photos/list.csv").symlink_to("../list.csv")
    assert absolute_spec("photos/list.csv") == f"{here}/photos/list.csv"


def test_spellings_of_one_folder_are_the_same_data_and_others_are_not(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    Path("link").symlink_to("photos")
    for spec in ("photos", "./photos", "photos/", "~/photos", "link", "../here/photos", str(here / "photos")):
        assert is_same_data(f"{here}/photos", spec)
        assert is_same_data(f"vtab:{here}/photos", f"vtab:{spec}")
        assert not is_same_data(f"{here}/photos", f"{spec}#final")
        assert not is_same_data(f"{here}/photos/red", spec)
    assert not is_same_data("digits", "photos")
    assert not is_same_data("photos", "hf:photos")


def test_a_run_of_relative_data_is_evaluated_and_resumed_and_exported_from_elsewhere(run, here, monkeypatch):
    task, args = ((run.path / name).read_bytes() for name in ("task.json", "args.toml"))
    monkeypatch.chdir(here.parent / "elsewhere")
    stored = Run.read(run.path)
    assert stored.data == str(here / "photos")
    assert stored.weights == str(here / "toy.safetensors")
    assert evaluate_run(stored).evaluation.images == 9
    assert gate_images(stored, None).source == "6 validation images of photos"
    train_run(TrainSettings.merge(read_toml(run.path / "args.toml")), run.path, resume=True)
    assert ((run.path / "task.json").read_bytes(), (run.path / "args.toml").read_bytes()) == (task, args)


@pytest.mark.parametrize("spelling", ["./photos", "photos/", "../here/photos", "link", "~/photos"])
def test_a_resume_may_spell_the_same_data_in_another_way(run, here, monkeypatch, spelling):
    monkeypatch.setenv("HOME", str(here))
    Path("link").symlink_to("photos")
    task = (run.path / "task.json").read_bytes()
    train_run(settings_for(spelling, "./toy.safetensors"), run.path, resume=True)
    assert (run.path / "task.json").read_bytes() == task


def test_a_resume_with_other_data_is_refused(run, here):
    shutil.copytree("photos", "others")
    with pytest.raises(SpecError, match=r"cannot resume with other settings: --data was .*/photos, now others"):
        train_run(settings_for("others", "toy.safetensors"), run.path, resume=True)


def test_an_earlier_versions_relative_data_are_found_from_where_they_were(run):
    make_old(run)
    assert evaluate_run(Run.read(run.path)).evaluation.images == 9
    train_run(TrainSettings.merge(read_toml(run.path / "args.toml")), run.path, resume=True)
    assert Run.read(run.path).data == str(Path.cwd() / "photos")


def test_relative_data_that_are_not_there_are_said_to_be_relative_and_to_what(run, here, monkeypatch):
    make_old(run)
    elsewhere = here.parent / "elsewhere"
    monkeypatch.chdir(elsewhere)
    told = rf"its data 'photos' is not there; the path is relative to where .* started, this is {elsewhere}"
    with pytest.raises(SpecError, match=f"{told}: .* --data"):
        evaluate_run(Run.read(run.path))
    stored = TrainSettings.merge(read_toml(run.path / "args.toml"))
    with pytest.raises(SpecError, match=told):
        train_run(stored, run.path, resume=True)
    assert evaluate_run(Run.read(run.path), data="../here/photos").evaluation.images == 9
    train_run(stored.changed(data="../here/photos"), run.path, resume=True)
    with pytest.raises(SpecError, match="--data was photos, now"):
        train_run(stored.changed(data="../here"), run.path, resume=True)


def test_data_that_were_moved_are_named_with_what_to_do(run, here):
    Path("photos").rename("moved")
    with pytest.raises(SpecError, match=rf"its data '{here}/photos' is not there; .*: give their place with --data"):
        evaluate_run(Run.read(run.path))
    assert evaluate_run(Run.read(run.path), data="moved").evaluation.images == 9
    with pytest.raises(SpecError, match=r"is not there; it was moved or deleted: put the data there, or a symbolic"):
        train_run(TrainSettings.merge(read_toml(run.path / "args.toml")), run.path, resume=True)
    source = gate_images(Run.read(run.path), None).source
    assert source == (
        "32 synthetic images (the run's own are not available: its data 'photos' is not there; --images DIR gives "
        "others)"
    )


@pytest.mark.parametrize("spec", ["digits", "hf:beans", "shapes:count#final"])
def test_data_that_are_no_path_are_never_missing(spec):
    assert missing_data(spec) is None
