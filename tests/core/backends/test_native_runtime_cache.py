from __future__ import annotations

from pathlib import Path

import pytest
from core.backends.native_host import open_host

from vpdeploy.format.artifact import Artifact


def test_what_was_compiled_is_kept_beside_the_engine_for_the_next_start(artifact: Artifact, tmp_path: Path):
    first = open_host(artifact, tmp_path, runtime="tensorrt-rtx")
    assert first.backend.describe().engine.runtime_cache.startswith("empty")
    first.backend.close()
    (path,) = tmp_path.glob("*.runtime-cache")
    assert path.name.endswith(".host-gpu-cuda13.0.runtime-cache")
    assert path.read_bytes() == b"compiled kernels"
    second = open_host(artifact, tmp_path, runtime="tensorrt-rtx")
    assert second.backend.describe().engine.runtime_cache == f"{path.name}, 16 bytes"
    second.backend.close()


def test_a_damaged_runtime_cache_is_ignored_with_a_note_and_written_anew(artifact: Artifact, tmp_path: Path):
    open_host(artifact, tmp_path, runtime="tensorrt-rtx").backend.close()
    (path,) = tmp_path.glob("*.runtime-cache")
    path.write_bytes(b"torn")
    native = open_host(artifact, tmp_path, runtime="tensorrt-rtx")
    assert "is damaged or of another driver and is ignored" in native.backend.describe().engine.runtime_cache
    native.backend.close()
    assert path.read_bytes() == b"compiled kernels"


def test_a_runtime_cache_that_cannot_be_written_is_a_warning_and_closing_goes_on(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    native = open_host(artifact, tmp_path, runtime="tensorrt-rtx")
    monkeypatch.setattr("vpdeploy.backends.native.runtime_cache.write_atomically", refuse)
    native.backend.close()
    assert "cannot be written (Permission denied); the next start compiles again" in caplog.text
    assert native.device.alive == 0


def test_tensorrt_keeps_no_runtime_cache(artifact: Artifact, tmp_path: Path):
    open_host(artifact, tmp_path).backend.close()
    assert list(tmp_path.glob("*.runtime-cache")) == []
