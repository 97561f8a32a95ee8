"""``vpdeploy predict``: many images, in whatever way they are named, to stdout or into a file."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs the export extra")
from PIL import Image
from server.toy_bundle import TASKS, encoded, write_toy_bundle

from vpdeploy.cli.main import main
from vpdeploy.session.session import Session
from vpdeploy.session.stream import MAX_PREDICT_BATCH

Captured = tuple[int, str, str]
Run = Callable[..., Captured]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_bundle(tmp_path_factory.mktemp("toy") / "zoo").path


@pytest.fixture
def predict(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the verb in the folder of the test: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object, task: str | None = "rgb", stdin: bytes = b"", model: Path = bundle) -> Captured:
        given = [*map(str, arguments), *([] if task is None else [f"--task={task}"])]
        monkeypatch.setattr(sys, "argv", ["vpdeploy", "predict", "--top=1", str(model), *given])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return int(str(stopped.value.code)), out, err

    return call


def paint(path: str | Path, colour: str) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(colour))
    return path


def answers(out: str) -> list[tuple[str, str]]:
    """The images that the text names, and the first class of each."""
    lines = out.splitlines()
    return [
        (name.removesuffix("  (rgb)"), best.split()[-1]) for name, best in zip(lines[::2], lines[1::2], strict=True)
    ]


# --- what is named ---


def test_a_folder_stands_for_its_visible_images_in_natural_order(predict: Run):
    for name in ("pets/10.png", "pets/2.PNG", "pets/old cats/1.png", "pets/.hidden.png", "pets/.cache/3.png"):
        paint(name, "red")
    Path("pets/notes.txt").write_text("no image")
    code, out, err = predict("pets")
    assert (code, err) == (0, "")
    assert [name for name, _ in answers(out)] == ["pets/2.PNG", "pets/10.png", "pets/old cats/1.png"]


def test_files_and_folders_are_answered_in_the_order_given_and_twice_if_named_twice(predict: Run):
    paint("z.png", "red")
    paint("folder/a.png", "blue")
    _, out, _ = predict("z.png", "folder", "z.png")
    assert answers(out) == [("z.png", "red"), ("folder/a.png", "blue"), ("z.png", "red")]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.png", ["a1.png", "a2.png", "a10.png"]),
        ("a?.png", ["a1.png", "a2.png"]),
        ("**/*.png", ["a1.png", "a2.png", "a10.png", "in/b.png", "in/deep/c.png"]),
        ("in/**", ["in/b.png", "in/d.jpg", "in/deep/c.png"]),
        ("i*/**/c.png", ["in/deep/c.png"]),
        ("*", ["a1.png", "a2.png", "a10.png"]),
    ],
)
def test_a_quoted_pattern_stands_for_the_images_that_it_matches(predict: Run, pattern: str, found: list[str]):
    for name in ("a1.png", "a2.png", "a10.png", "in/b.png", "in/d.jpg", "in/deep/c.png", ".e.png", ".f/g.png"):
        paint(name, "red")
    Path("a3.txt").touch()
    code, out, err = predict(pattern)
    assert (code, err) == (0, "")
    assert [name for name, _ in answers(out)] == found


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(predict: Run):
    paint("a[1].png", "red")
    paint("a1.png", "blue")
    assert answers(predict("a[1].png")[1]) == [("a[1].png", "red")]


def test_a_pattern_does_not_go_round_in_links(predict: Run):
    paint("a.png", "red")
    for name in ("one", "two"):
        Path(name).symlink_to(".")
    code, out, err = predict("**/*.png")
    assert (code, answers(out), err) == (0, [("a.png", "red")], "")


@pytest.mark.parametrize("between", [b"\n", b"\r\n", b"\0"])
def test_paths_come_on_stdin(predict: Run, between: bytes):
    paint("a b.png", "red")
    paint("ünï 🌹.png", "green")
    paint("folder/c.png", "blue")
    code, out, err = predict("-", stdin=between.join([b"a b.png", "ünï 🌹.png".encode(), b"", b"folder", b""]))
    assert (code, err) == (0, "")
    assert answers(out) == [("a b.png", "red"), ("ünï 🌹.png", "green"), ("folder/c.png", "blue")]


def test_a_list_with_nul_may_hold_names_with_line_breaks_and_needs_no_last_nul(predict: Run):
    paint("a\nb.png", "red")
    paint("c.png", "blue")
    _, out, _ = predict("-", stdin=b"a\nb.png\0c.png")
    assert answers(out) == [("a\\nb.png", "red"), ("c.png", "blue")]


def test_names_on_stdin_are_no_patterns(predict: Run):
    paint("a1.png", "red")
    assert predict("-", stdin=b"a*.png")[::2] == (1, "error: a*.png: file not found\n")


def test_stdin_without_paths_is_an_error(predict: Run):
    assert predict("-", stdin=b"\n\n") == (1, "", "error: no images: stdin names none\n")


def test_names_that_begin_with_a_dash(predict: Run):
    paint("-x.png", "red")
    assert answers(predict("./-x.png")[1]) == [("-x.png", "red")]
    assert answers(predict("--task=rgb", "--", "-x.png", task=None)[1]) == [("-x.png", "red")]


def test_what_a_shell_puts_in_the_place_of_a_command_is_read(bundle: Path, tmp_path: Path):
    paint(tmp_path / "a.png", "green")
    line = f"'{sys.executable}' -m vpdeploy predict '{bundle}' --task rgb --top 1 <(cat '{tmp_path}/a.png')"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True, timeout=120)
    assert "green" in done.stdout


# --- what is wrong ---


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none.png", "file not found"),
        ("empty", "the folder holds no images that are not hidden"),
        ("*.jpg", "matches no image; **/ in a pattern looks into folders"),
        ("**/*.jpg", "matches no image"),
        ("https://example.org/a.jpg?size=*", "is a URL; download it first (curl -O) and name the file"),
        ("s3://bucket/a.jpg", "is a URL; download it first (curl -O) and name the file"),
        ("pipe.png", "is a pipe, not a file"),
        ("x" * 5000, "not a readable image ("),
        ("zero.png", "not a readable image (empty, 0 bytes)"),
        ("sparse.png", "not a readable image (not in a known image format)"),
        ("half.png", "not a readable image ("),
        ("folder/loop", "the symbolic link leads back to a folder above it: remove it"),
        ("folder/broken.png", "the symbolic link leads nowhere: restore its target or remove it"),
    ],
)
def test_what_is_no_image_is_named_and_the_others_are_answered(predict: Run, name: str, reason: str):
    paint("good.png", "red")
    Path("zero.png").touch()
    with Path("sparse.png").open("wb") as file:
        file.truncate(3_000_000_000)
    Path("half.png").write_bytes(encoded("red")[:40])
    os.mkfifo("pipe.png")
    Path("empty").mkdir()
    argument = name
    if name.startswith("folder/"):
        Path("folder").mkdir()
        Path(name).symlink_to("." if name.endswith("loop") else "nowhere")
        argument = "folder"
    code, out, err = predict("good.png", argument, "good.png")
    first, last = err.splitlines()
    assert code == 1
    assert first.startswith(f"error: {name}: {reason}")
    assert last == "error: 1 of 3 images could not be read"
    assert answers(out) == [("good.png", "red")] * 2


def test_one_bad_image_alone_is_one_line(predict: Run):
    Path("zero.png").touch()
    code, out, err = predict("zero.png")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: zero.png: ")


@pytest.mark.parametrize("names", [("none.png",), ("none.png", "https://example.org/a.jpg")])
def test_no_graph_is_loaded_for_names_that_lead_nowhere(
    predict: Run, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
):
    monkeypatch.setattr(Session, "of", None)
    code, out, _ = predict(*names, "--json")
    assert code == 1
    assert [row["image"] for row in json.loads(out)] == list(names)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (None, "several tasks are loaded, name one of: rgb, bgr, warm (--task NAME)"),
        ("wram", "no task 'wram' (did you mean 'warm'?); loaded: rgb, bgr, warm"),
        ("RGB", "no task 'RGB' (did you mean 'rgb'?); loaded: rgb, bgr, warm"),
        ("nothing", "no task 'nothing'; loaded: rgb, bgr, warm"),
    ],
)
def test_a_task_is_asked_for_before_the_graph_is_loaded(
    predict: Run, monkeypatch: pytest.MonkeyPatch, task: str | None, message: str
):
    monkeypatch.setattr(Session, "of", None)
    paint("a.png", "red")
    assert predict("a.png", task=task) == (1, "", f"error: {message}\n")


# --- where the answers go ---


def test_json_holds_the_images_that_cannot_be_read(predict: Run):
    paint("a.png", "red")
    Path("zero.png").touch()
    code, out, _ = predict("a.png", "zero.png", "none.png", "--json")
    good, zero, none = json.loads(out)
    assert code == 1
    assert (good["image"], good["task"], good["predictions"][0]["label"]) == ("a.png", "rgb", "red")
    assert zero["image"] == "zero.png"
    assert zero["error"].startswith("not a readable image")
    assert none == {"image": "none.png", "error": "file not found"}
    assert out == json.dumps([good, zero, none], indent=2, ensure_ascii=False) + "\n"


NAMES = (
    *("plain.png", "with space.png", 'a,"b".png', "ünï 🌹.png"),
    *("new\nline.png", "return\r.png", os.fsdecode(b"\xff.png")),
)


def test_a_csv_has_a_row_for_each_image(predict: Run):
    for name in NAMES:
        paint(name, "green")
    Path("zero.png").touch()
    code, out, err = predict(*NAMES, "zero.png", "--out", "all.csv", "--top", 2)
    assert (code, out) == (1, "")
    assert "wrote all.csv: 8 images\n" in err
    with Path("all.csv").open(newline="", encoding="utf-8") as file:
        *rows, bad = csv.DictReader(file)
    assert list(bad) == ["image", "task", "label", "probability", "label_2", "probability_2", "error"]
    assert [row["image"] for row in rows] == [*NAMES[:-1], "\\udcff.png"]
    for row in rows:
        assert (row["task"], row["label"], row["error"]) == ("rgb", "green", "")
        assert float(row["probability"]) > 0.99 > float(row["probability_2"])
    assert (bad["image"], bad["label"], bad["probability"]) == ("zero.png", "", "")
    assert bad["error"].startswith("not a readable image")


def test_a_csv_has_no_more_columns_than_the_task_has_classes(predict: Run):
    paint("a.png", "red")
    predict("a.png", "--out", "all.csv", "--top", 9, task="warm")
    assert Path("all.csv").read_text().splitlines()[0].count("label") == len(TASKS["warm"])


def test_json_lines_hold_a_line_for_each_image_and_names_survive(predict: Run):
    for name in NAMES:
        paint(name, "blue")
    code, out, _ = predict(*NAMES, "none.png", "--out", "all.jsonl")
    assert (code, out) == (1, "")
    *rows, bad = [json.loads(line) for line in Path("all.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["image"] for row in rows] == list(NAMES)
    assert {row["predictions"][0]["label"] for row in rows} == {"blue"}
    assert bad == {"image": "none.png", "error": "file not found"}


def test_a_name_that_is_no_text_is_printed_with_escapes(predict: Run):
    name = paint(NAMES[-1], "red")
    assert answers(predict(name)[1]) == [("\\udcff.png", "red")]
    assert json.loads(predict(name, "--json")[1])[0]["image"] == str(name)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("all.txt", "--out all.txt: expected a file that ends in .csv or .jsonl"),
        ("all", "--out all: expected a file that ends in .csv or .jsonl"),
        ("missing/all.csv", "--out missing/all.csv: there is no folder missing; make it first"),
        ("folder.csv", "--out folder.csv: is there and is not a file; name another one"),
    ],
)
def test_an_out_that_cannot_be_is_refused_before_anything_is_read(predict: Run, tmp_path: Path, out: str, message: str):
    Path(tmp_path / "folder.csv").mkdir()
    before = set(tmp_path.iterdir())
    assert predict("none.png", "--out", out, model=tmp_path / "none") == (1, "", f"error: {message}\n")
    assert set(tmp_path.iterdir()) == before


def test_an_out_that_is_there_is_replaced_and_a_link_stays_one(predict: Run):
    paint("a.png", "red")
    Path("old.csv").write_text("old")
    Path("link.csv").symlink_to("old.csv")
    assert predict("a.png", "--out", "link.csv")[0] == 0
    assert Path("link.csv").is_symlink()
    assert "a.png" in Path("old.csv").read_text()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("lost")])
def test_an_out_is_as_it_was_if_the_work_does_not_end(
    predict: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
):
    calls = []

    def stop(self: Session, images: np.ndarray, slots: np.ndarray) -> np.ndarray:
        calls.append(len(images))
        if len(calls) > 1:
            raise error
        return np.zeros((len(images), 3), np.float32)

    paint("a.png", "red")
    Path("all.csv").write_text("old")
    monkeypatch.setattr(Session, "run", stop)
    assert predict(*["a.png"] * 40, "--out", "all.csv")[0] != 0
    assert len(calls) == 2
    assert Path("all.csv").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "all.csv"}


def test_many_images_run_in_batches_and_their_pace_is_told(predict: Run, monkeypatch: pytest.MonkeyPatch):
    sizes: list[int] = []
    run = Session.run

    def note(self: Session, images: np.ndarray, slots: np.ndarray) -> np.ndarray:
        sizes.append(len(images))
        return run(self, images, slots)

    monkeypatch.setattr(Session, "run", note)
    paint("a.png", "red")
    code, out, err = predict(*["a.png"] * 150)
    assert (code, len(answers(out))) == (0, 150)
    assert max(sizes) == MAX_PREDICT_BATCH
    assert re.fullmatch(r"150 images in [\d.]+ s: \d+ a second\n", err)


def test_a_reader_that_goes_away_ends_it_quietly(bundle: Path, tmp_path: Path):
    paint(tmp_path / "a.png", "red")
    names = " ".join(["a.png"] * 2000)
    line = f"'{sys.executable}' -m vpdeploy predict '{bundle}' {names} --task rgb | head -n 1"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120)
    assert (done.stdout, done.stderr) == ("a.png  (rgb)\n", "")


def test_images_of_every_mode_are_answered(predict: Run):
    picture = Image.new("RGB", (20, 20), (255, 0, 0))
    picture.convert("RGBA").save("rgba.png")
    picture.convert("CMYK").save("cmyk.jpg")
    picture.save("moving.gif", save_all=True, append_images=[Image.new("RGB", (20, 20), (0, 0, 255))])
    Image.fromarray(np.full((20, 20), 65535, np.uint16)).save("deep.png")
    code, out, _ = predict(".")
    assert code == 0
    found = dict(answers(out))
    assert found.pop("deep.png")  # it is white, and any colour as good as another
    assert found == {"cmyk.jpg": "red", "moving.gif": "red", "rgba.png": "red"}
