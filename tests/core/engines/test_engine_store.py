from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from core.engines.conftest import A10, L4, VERSION, card_of

from vpdeploy.engines import store
from vpdeploy.engines.plan import EngineCard, EngineOptions
from vpdeploy.engines.store import (
    FoundEngine,
    engine_obstacle,
    find_engine,
    fits,
    leftover_engines,
    list_engines,
    remove_engines,
    verify_engine,
    write_engine,
)
from vpdeploy.engines.toolkit import host_platform
from vpdeploy.errors import BuildError, BundleCorruptError, EngineIncompatibleError
from vpdeploy.format.artifact import Artifact
from vpdeploy.machine import Gpu

Place = Callable[..., FoundEngine]
Machine = Callable[[Gpu | None], None]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both runtimes, each in its version; nothing of them is called."""

    class Loaded:
        def __init__(self, version: str) -> None:
            self.version = version

    versions = {"tensorrt-rtx": VERSION, "tensorrt": "10.13.0.35"}
    monkeypatch.setattr(store, "load_toolkit", lambda name: Loaded(versions[name]))
    monkeypatch.setattr(store, "is_installed", lambda name: True)


def tensorrt(**changes: object) -> dict[str, object]:
    """Fields of a plan for TensorRT on an L4."""
    fields = {"runtime": "tensorrt", "runtime_version": "10.13.0.35", "targets": ("sm_89",), "gpu_name": L4.name}
    return {**fields, "platform": host_platform(), **changes}


def test_an_engine_and_its_card_are_found_again(toy_artifact: Artifact, place_engine: Place, installed):
    placed = place_engine(b"engine")
    found = find_engine(toy_artifact, "tensorrt-rtx", L4)
    assert found == placed
    assert found.path.read_bytes() == b"engine"
    assert found.path.parent == toy_artifact.path / "engines"
    verify_engine(found)
    assert sorted(path.name for path in found.path.parent.iterdir()) == [
        ".lock",
        f"{found.card.key}.engine",
        f"{found.card.key}.json",
    ]


def test_the_newest_of_several_fitting_engines_is_taken(toy_artifact: Artifact, place_engine: Place, installed):
    first, second = place_engine(targets=("sm_89",)), place_engine(targets=("sm_80", "sm_89"))
    for age, each in enumerate((second, first)):
        os.utime(each.path.with_name(f"{each.card.key}.json"), (1000 - age, 1000 - age))
    assert find_engine(toy_artifact, "tensorrt-rtx", L4) == second


@pytest.mark.parametrize(
    ("plan", "gpu", "here", "reason"),
    [
        ({}, L4, VERSION, None),
        ({}, A10, VERSION, None),
        ({"targets": ("sm_86",)}, L4, VERSION, r"built for sm_86, here is NVIDIA L4 \(sm_89\)"),
        ({}, L4, "1.7.2.1", "it needs tensorrt-rtx 1.7.1.116, here is 1.7.2.1"),
        (tensorrt(), L4, "10.13.0.35", None),
        (tensorrt(), L4, "10.13.0.36", "it needs tensorrt 10.13.0.35, here is 10.13.0.36"),
        (tensorrt(gpu_name="NVIDIA L40S"), L4, "10.13.0.35", r"built for NVIDIA L40S \(sm_89\), here is NVIDIA L4"),
        (tensorrt(platform="win32-x86_64"), L4, "10.13.0.35", "built on win32-x86_64, here is"),
        (tensorrt(gpu_name=None, options=EngineOptions(hardware="same-sm")), L4, "10.13.0.35", None),
        (tensorrt(gpu_name=None, options=EngineOptions(hardware="same-sm")), A10, "10.13.0.35", "here is NVIDIA A10"),
        (tensorrt(gpu_name=None, options=EngineOptions(hardware="ampere+")), A10, "10.13.0.35", None),
        (tensorrt(options=EngineOptions(version_compatible=True)), L4, "10.14.1.1", None),
        (tensorrt(options=EngineOptions(version_compatible=True)), L4, "11.0.0.1", None),
        (tensorrt(options=EngineOptions(version_compatible=True)), L4, "12.0.0.1", "10.13.0.35 or newer, here is 12"),
        (tensorrt(options=EngineOptions(version_compatible=True)), L4, "10.12.0.1", "10.13.0.35 or newer, here is"),
    ],
)
def test_an_engine_fits_where_nvidia_says_that_it_does(toy_artifact: Artifact, plan, gpu, here, reason):
    found = fits(card_of(toy_artifact, b"engine", **plan), gpu, here)
    assert (found is None) if reason is None else re.search(reason, str(found)), found


def test_a_turing_gpu_is_not_ampere_or_newer(toy_artifact: Artifact):
    t4 = Gpu(name="Tesla T4", sm="sm_75", memory_bytes=1, cuda_version="13.0")
    card = card_of(toy_artifact, b"engine", **tensorrt(gpu_name=None, options=EngineOptions(hardware="ampere+")))
    assert fits(card, t4, "10.13.0.35") is not None
    assert fits(card, Gpu(name="RTX 5090", sm="sm_120", memory_bytes=1, cuda_version="13.0"), "10.13.0.35") is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"targets": ("sm_86",)}, r"it was built for sm_86, here is NVIDIA L4 \(sm_89\)"),
        ({"runtime_version": "1.6.0.5"}, r"it needs tensorrt-rtx 1\.6\.0\.5, here is 1\.7\.1\.116"),
        ({"graph_sha256": "00" * 32}, "it belongs to another graph"),
    ],
)
def test_a_foreign_engine_is_named_with_what_is_here_and_the_command(
    toy_artifact: Artifact, place_engine: Place, installed, changes, reason
):
    key = place_engine(**changes).card.key
    with pytest.raises(EngineIncompatibleError, match=rf"{key}\.engine: {reason}") as caught:
        find_engine(toy_artifact, "tensorrt-rtx", L4)
    assert str(caught.value).endswith(f"run: vpdeploy build {toy_artifact.path} --runtime tensorrt-rtx")
    assert "\n" not in str(caught.value)


def test_a_graph_without_engines_says_which_command_builds_one(toy_artifact: Artifact, installed):
    with pytest.raises(
        EngineIncompatibleError, match=r"no engine for NVIDIA L4 \(sm_89\) and tensorrt-rtx .*; run: vp"
    ):
        find_engine(toy_artifact, "tensorrt-rtx", L4)


def test_engines_of_the_other_runtime_are_no_candidates(toy_artifact: Artifact, place_engine: Place, installed):
    place_engine()
    with pytest.raises(EngineIncompatibleError, match=r"and tensorrt 10\.13\.0\.35; run"):
        find_engine(toy_artifact, "tensorrt", L4)


def test_the_obstacle_names_the_first_thing_that_is_missing(
    toy_artifact: Artifact, place_engine: Place, installed, machine: Machine, monkeypatch: pytest.MonkeyPatch
):
    machine(L4)
    assert "has no engine for it; run: vpdeploy build" in str(engine_obstacle(toy_artifact, "tensorrt-rtx"))
    place_engine(targets=("sm_86",))
    assert "here is NVIDIA L4" in str(engine_obstacle(toy_artifact, "tensorrt-rtx"))
    place_engine()
    assert engine_obstacle(toy_artifact, "tensorrt-rtx") is None
    machine(None)
    assert engine_obstacle(toy_artifact, "tensorrt-rtx") == "no NVIDIA driver"
    monkeypatch.setattr(store, "is_installed", lambda name: False)
    assert "pip install 'vpdeploy[rtx]'" in str(engine_obstacle(toy_artifact, "tensorrt-rtx"))


def test_a_truncated_or_changed_engine_is_found_out(place_engine: Place):
    found = place_engine(b"0123456789")
    found.path.write_bytes(b"01234")
    with pytest.raises(BundleCorruptError, match="truncated, 5 of 10 bytes"):
        verify_engine(found)
    found.path.write_bytes(b"0123456780")
    with pytest.raises(BundleCorruptError, match="do not match its sidecar's sha256; run vpdeploy build again"):
        verify_engine(found)
    found.path.unlink()
    with pytest.raises(BundleCorruptError, match="cannot be read"):
        verify_engine(found)


def test_half_an_engine_is_none(toy_artifact: Artifact, place_engine: Place, installed):
    folder = toy_artifact.engines_folder
    one, other, third, fourth = (place_engine(targets=(sm,)) for sm in ("sm_75", "sm_80", "sm_89", "sm_120"))
    other.path.unlink()
    (folder / f"{one.card.key}.json").unlink()
    sidecar = folder / f"{third.card.key}.json"
    sidecar.write_text(sidecar.read_text().replace("sm_89", "sm_86"))
    (folder / f"{fourth.card.key}.json").write_text('{"format": "vpdeploy.en')
    listed = {path.name: text for path, text in list_engines(toy_artifact)}
    assert "sidecar" in str(listed[one.path.name])
    assert "only its sidecar is there" in str(listed[other.path.name])
    assert "describes another engine" in str(listed[third.path.name])
    assert "not valid JSON" in str(listed[fourth.path.name])
    with pytest.raises(EngineIncompatibleError, match="and 1 more"):
        find_engine(toy_artifact, "tensorrt-rtx", L4)


def test_a_full_disk_leaves_the_old_engine_and_no_other_file(
    toy_artifact: Artifact, place_engine: Place, monkeypatch: pytest.MonkeyPatch
):
    old = place_engine(b"old engine")
    before = {path.name: path.read_bytes() for path in toy_artifact.engines_folder.iterdir()}
    real = Path.write_bytes

    def half(path: Path, data: memoryview) -> int:
        real(path, bytes(data)[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(BuildError, match="the disk is full; free some space"):
        place_engine(b"new engine")
    assert {path.name: path.read_bytes() for path in toy_artifact.engines_folder.iterdir()} == before
    verify_engine(old)


KILLED = """
import os, signal, sys
from pathlib import Path
from vpdeploy import files
from vpdeploy.format.document import Document
from vpdeploy.engines.plan import EngineCard
from vpdeploy.engines.store import write_engine

folder, card, at = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
real_replace, real_write = Path.replace, Path.write_bytes

def replace(path, target):
    if at == "before engine" and str(target).endswith(".engine"):
        os.kill(os.getpid(), signal.SIGKILL)
    done = real_replace(path, target)
    if at == "before card" and str(target).endswith(".engine"):
        os.kill(os.getpid(), signal.SIGKILL)
    return done

def write(path, data):
    if at == "in engine":
        real_write(path, bytes(data)[:3])
        os.kill(os.getpid(), signal.SIGKILL)
    return real_write(path, data)

Path.replace, Path.write_bytes = replace, write
write_engine(folder, memoryview(b"new engine"), EngineCard.from_document(Document.read(card)))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")
@pytest.mark.parametrize("at", ["in engine", "before engine", "before card"])
@pytest.mark.parametrize("old", [None, b"old engine"])
def test_a_kill_while_writing_leaves_an_engine_that_is_whole_or_known_not_to_be(
    toy_artifact: Artifact, place_engine: Place, tmp_path: Path, at: str, old: bytes | None, installed
):
    new = card_of(toy_artifact, b"new engine")
    (tmp_path / "card.json").write_text(json.dumps(new.to_fields()))
    if old is not None:
        place_engine(old)
    other = place_engine(b"other", targets=("sm_75",))
    arguments = [str(toy_artifact.engines_folder), str(tmp_path / "card.json"), at]
    finished = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False, capture_output=True)
    assert finished.returncode == -9, finished.stderr
    verify_engine(other)
    listed = dict(list_engines(toy_artifact)).get(toy_artifact.engines_folder / f"{new.key}.engine")
    if isinstance(listed, EngineCard):
        found = find_engine(toy_artifact, "tensorrt-rtx", L4)
        if at == "before card":
            with pytest.raises(BundleCorruptError):
                verify_engine(found)
        else:
            verify_engine(found)
            assert found.path.read_bytes() == old
    else:
        assert old is None
    again = write_engine(toy_artifact.engines_folder, memoryview(b"new engine"), new)
    verify_engine(again)
    assert not list(toy_artifact.engines_folder.glob(".*.partial"))


def test_only_engines_that_no_graph_beside_them_needs_are_left_over(toy_artifact: Artifact, place_engine: Place):
    sibling = toy_artifact.path / "other.onnx"
    sibling.write_bytes(b"another graph")
    kept = place_engine(b"mine")
    kept_too = place_engine(b"sibling's", graph_sha256=hashlib.sha256(b"another graph").hexdigest())
    gone = place_engine(b"of a graph that was replaced", graph_sha256="00" * 32)
    (toy_artifact.engines_folder / f"{gone.card.key}.cache").write_bytes(b"kept beside the engine by the runner")
    assert leftover_engines(toy_artifact) == [gone.path]
    remove_engines([gone.path])
    names = {path.name.rpartition(".")[0] for path in toy_artifact.engines_folder.iterdir()}
    assert names == {"", kept.card.key, kept_too.card.key}
    assert leftover_engines(toy_artifact) == []
