"""Sessions over the native runner: every family of layouts, and float16 tables, against ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from core.backends.native_host import Native, open_host
from core.backends.tables import MakePixels

from vpdeploy import load
from vpdeploy.format.artifact import Artifact
from vpdeploy.session.session import Session


@pytest.fixture(scope="module")
def mixed_runs(tmp_path_factory: pytest.TempPathFactory, shared_traces: Path) -> list[Path]:
    """E²VPT, VAPT and a linear head."""
    import tiny_runs

    return tiny_runs.write_mixed_runs(tmp_path_factory.mktemp("mixed"))


@pytest.fixture(scope="module", params=["superset", "adaptive", "float16"])
def bundle(request: pytest.FixtureRequest, mixed_runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from exports import export_bundle

    out = tmp_path_factory.mktemp(request.param) / "zoo"
    chosen = mixed_runs[1:] if request.param == "adaptive" else mixed_runs
    return export_bundle(chosen, out, precision="fp16" if request.param == "float16" else "fp32").path


def native_session(artifact: Artifact, folder: Path) -> tuple[Session, Native]:
    native = open_host(artifact, folder)
    return Session(artifact, native.backend), native


def test_a_session_mixes_tasks_of_all_kinds_as_onnx_runtime_does(
    bundle: Path, tmp_path: Path, random_pixels: MakePixels
):
    artifact = Artifact.open(bundle)
    session, native = native_session(artifact, tmp_path)
    with load(bundle, runtime="onnxruntime-cpu", threads=1) as expected, session:
        pixels = random_pixels(7)
        order = np.arange(7) % len(expected.tasks)
        for _ in range(3):
            answers = [
                each.run(pixels, np.array([each.lease(each.tasks[index]).slot for index in order], np.int32))
                for each in (session, expected)
            ]
            np.testing.assert_allclose(answers[0], answers[1], rtol=1e-4, atol=1e-4)
        described = session.describe()
        assert described.table_bytes <= described.runtime.engine.memory.table
    assert native.device.alive == 0


def test_a_task_that_comes_while_serving_is_answered_and_the_others_stay(
    bundle: Path, tmp_path: Path, random_pixels: MakePixels
):
    artifact = Artifact.open(bundle)
    session, native = native_session(artifact, tmp_path)
    with session:
        names = session.tasks
        before = session.run(random_pixels(2), np.array([0, 1], np.int32))
        session.remove_task(names[-1])
        session.add_task(artifact.read_prompt_set(names[-1]), version=2)
        with session.lease(names[-1]) as lease:
            session.run(random_pixels(2), np.full(2, lease.slot, np.int32))
        after = session.run(random_pixels(2), np.array([0, 1], np.int32))
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
    assert native.device.alive == 0
