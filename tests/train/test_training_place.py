"""The folder of a run: what is free, what was begun, and what a kill leaves between the two."""

import shutil

import pytest

from vpdeploy.errors import SpecError
from vpdeploy_train import place
from vpdeploy_train.place import check_begun, check_new_place, choose_task_name, note_beginning


class Killed(BaseException):
    pass


def begin(out, *, skipped="", name="birds"):
    note_beginning(out, name=name, skipped=skipped, settings="epochs = 1\n")


@pytest.mark.parametrize("written", [0, 1, 2])
@pytest.mark.parametrize("partial", [False, True])
def test_a_folder_is_free_until_a_training_can_be_continued_in_it(tmp_path, monkeypatch, written, partial):
    out = tmp_path / "run"
    real, count = place.write_atomically, 0

    def write(path, data):
        nonlocal count
        if count == written:
            if partial:  # a kill runs no clean-up
                path.parent.mkdir(parents=True, exist_ok=True)
                (path.parent / f".{path.name}.abc.partial").write_bytes(data[:3])
            raise Killed
        count += 1
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(place, "write_atomically", write)
        with pytest.raises(Killed):
            begin(out, skipped="a.jpg: cut off\n", name="owls")
    check_new_place(out)
    with pytest.raises(SpecError, match="nothing to resume"):
        check_begun(out)

    begin(out)
    assert sorted(str(each.relative_to(out)) for each in out.rglob("*")) == ["args.toml", "state", "state/name.txt"]
    assert choose_task_name(out, name=None, resume=True) == "birds"
    check_begun(out)
    with pytest.raises(SpecError, match="continue it with --resume"):
        check_new_place(out)


@pytest.mark.parametrize("mine", ["skipped.txt", "state/train.safetensors", "note.txt", ".args.toml.abc.partial"])
def test_what_somebody_else_wrote_is_never_in_a_free_folder(tmp_path, mine):
    out = tmp_path / "run"
    (out / mine).parent.mkdir(parents=True)
    (out / mine).write_text("mine")
    with pytest.raises(SpecError, match="exists and is not empty; give another --out"):
        check_new_place(out)


def test_one_more_file_beside_what_a_kill_left_is_kept(tmp_path):
    begin(tmp_path / "run")
    (tmp_path / "run" / "args.toml").unlink()
    check_new_place(tmp_path / "run")
    (tmp_path / "run" / "note.txt").write_text("mine")
    with pytest.raises(SpecError, match="exists and is not empty"):
        check_new_place(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
