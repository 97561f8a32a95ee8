"""The timing cache's file, with a library that counts entries; the calls themselves are held against TensorRT's API."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from core.engines.conftest import A10, L4

from vpdeploy.engines.timing_cache import load_timing_cache, save_timing_cache, timing_cache_path

TOOLKIT: Any = SimpleNamespace(name="tensorrt", version="10.13.0.35", take_errors=lambda: "")


class Cache:
    """As ``ITimingCache``: entries by name."""

    def __init__(self, data: bytes) -> None:
        self.entries: dict[str, int] = json.loads(data) if data else {}

    def combine(self, other: Cache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.entries = {**other.entries, **self.entries}
        return True

    def serialize(self) -> bytes:
        return json.dumps(self.entries).encode()


class Config:
    """As ``IBuilderConfig`` where timing caches are concerned."""

    def __init__(self) -> None:
        self.cache: Cache | None = None

    def create_timing_cache(self, data: bytes) -> Cache | None:
        try:
            return Cache(data)
        except ValueError:
            return None

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.cache = cache
        return True

    def get_timing_cache(self) -> Cache | None:
        return self.cache


def build(path: Path, entries: dict[str, int]) -> dict[str, int]:
    """Return what a build that times these kernels finds timed already."""
    config = Config()
    load_timing_cache(TOOLKIT, config, path)
    assert config.cache is not None
    known = dict(config.cache.entries)
    config.cache.entries.update(entries)
    save_timing_cache(config, path)
    return known


def test_each_gpu_and_version_has_a_file_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    newer: Any = SimpleNamespace(name="tensorrt", version="10.14.1.48")
    paths = {timing_cache_path(TOOLKIT, L4), timing_cache_path(TOOLKIT, A10), timing_cache_path(newer, L4)}
    assert len(paths) == 3
    assert {path.parent for path in paths} == {tmp_path / "vpdeploy" / "timing"}
    assert timing_cache_path(TOOLKIT, L4).name == "tensorrt-10.13.0.35-sm_89-NVIDIA-L4.cache"


def test_a_later_build_knows_what_earlier_ones_have_timed(tmp_path: Path):
    path = tmp_path / "folder" / "gpu.cache"
    assert build(path, {"gemm": 1}) == {}
    assert build(path, {"softmax": 2}) == {"gemm": 1}
    assert build(path, {}) == {"gemm": 1, "softmax": 2}


def test_what_another_build_has_written_meanwhile_is_kept(tmp_path: Path):
    path = tmp_path / "gpu.cache"
    config = Config()
    load_timing_cache(TOOLKIT, config, path)
    build(path, {"by the other": 1})
    assert config.cache is not None
    config.cache.entries["mine"] = 2
    save_timing_cache(config, path)
    assert json.loads(path.read_bytes()) == {"by the other": 1, "mine": 2}


def test_builds_at_the_same_time_lose_nothing(tmp_path: Path):
    path = tmp_path / "gpu.cache"
    threads = [threading.Thread(target=build, args=(path, {f"kernel {number}": number})) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(json.loads(path.read_bytes())) == 12


def test_a_damaged_file_is_left_out_with_a_notice_and_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "gpu.cache"
    path.write_bytes(b"\x00garbage")
    assert build(path, {"gemm": 1}) == {}
    assert "not a timing cache of this GPU and version" in caplog.text


def test_a_cache_folder_that_cannot_be_written_costs_time_and_no_engine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "file").write_text("in the way")
    assert build(tmp_path / "file" / "gpu.cache", {"gemm": 1}) == {}
    assert "not written" in caplog.text
