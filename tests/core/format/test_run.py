from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from core import toy

from vpdeploy.errors import BundleCorruptError, BundleError
from vpdeploy.format.document import to_json
from vpdeploy.format.run import ARGS_FILE, CARD_FILE, FORMAT, TENSOR_FILE, RunCard, digests_to_fields
from vpdeploy.inspection.report import inspect_path

GOLDEN = Path(__file__).parents[2] / "golden" / "version1" / "run"
TENSORS = b"tensors"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of format version 2 without training."""
    digests = {TENSOR_FILE: hashlib.sha256(TENSORS).hexdigest()}
    fields = {
        "format": FORMAT,
        "format_version": 2,
        "files": digests_to_fields(digests),
        "task": toy.prompt_set().card.to_fields(),
    }
    path = tmp_path / "run"
    path.mkdir()
    (path / CARD_FILE).write_text(to_json(fields))
    (path / TENSOR_FILE).write_bytes(TENSORS)
    return path


def test_a_whole_run_is_read_and_checked(run: Path):
    card = RunCard.read(run)
    assert card.task.name == "flowers"
    card.verify(TENSOR_FILE)
    report = inspect_path(run).to_json()
    assert (report["kind"], report["checked"], report["damage"]) == ("run", True, [])


@pytest.mark.parametrize("position", range(len(TENSORS)))
def test_any_flipped_byte_is_found_and_the_rest_is_still_told(run: Path, position: int):
    changed = bytearray(TENSORS)
    changed[position] ^= 1
    (run / TENSOR_FILE).write_bytes(changed)
    with pytest.raises(BundleCorruptError, match=r"prompts\.safetensors: contents do not match the sha256 in task"):
        RunCard.read(run).verify(TENSOR_FILE)
    report = inspect_path(run)
    assert report.damage == (RunCard.read(run).damage(TENSOR_FILE),)
    assert report.to_json()["task"] == "flowers"


def test_a_missing_file_is_named(run: Path):
    (run / TENSOR_FILE).unlink()
    with pytest.raises(BundleCorruptError, match=r"prompts\.safetensors: file is missing"):
        RunCard.read(run).verify(TENSOR_FILE)
    assert len(inspect_path(run).damage) == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "prompts.safetensors is missing"),
        ({TENSOR_FILE: {"sha256": "0"}, "../../secret": {"sha256": "0"}}, "not the name of a file in the run"),
        ({TENSOR_FILE: {"sha256": 1}}, "should be str"),
        ({TENSOR_FILE: "0"}, "should be dict"),
        (None, "'files' should be dict"),
    ],
    ids=str,
)
def test_a_card_whose_digests_make_no_sense_is_damaged(run: Path, files: object, message: str):
    fields = json.loads((run / CARD_FILE).read_text())
    (run / CARD_FILE).write_text(json.dumps({**fields, "files": files}))
    with pytest.raises(BundleCorruptError, match=message):
        RunCard.read(run)


def test_an_unfinished_run_is_no_damaged_one(run: Path):
    (run / CARD_FILE).unlink()
    with pytest.raises(BundleError, match=r"not a finished run, task\.json is missing; write one with vpdeploy train"):
        RunCard.read(run)
    (run / ARGS_FILE).write_text("")
    with pytest.raises(BundleError, match=r"finish it with: vpdeploy train --out .* --resume"):
        RunCard.read(run)


def test_a_run_of_version_1_is_read_unchecked_and_inspect_says_so(tmp_path: Path):
    run = Path(shutil.copytree(GOLDEN, tmp_path / "run"))
    card = RunCard.read(run)
    assert (card.task.name, card.digests) == ("probe", {})
    card.verify(TENSOR_FILE)
    report = inspect_path(run).to_json()
    assert (report["checked"], report["damage"]) == (False, [])
