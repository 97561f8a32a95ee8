"""Bundles whose graphs are real, engines whose bytes are not, and the toolkit that builds real ones without a GPU."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core import toy

from vpdeploy.engines.plan import EngineCard, EngineOptions, EnginePlan
from vpdeploy.engines.profile import AxisRange, Profile
from vpdeploy.engines.store import FoundEngine, write_engine
from vpdeploy.engines.toolkit import Toolkit, is_installed, load_toolkit
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.interface import Binding
from vpdeploy.machine import Gpu

L4 = Gpu(name="NVIDIA L4", sm="sm_89", memory_bytes=24 * 10**9, cuda_version="13.0")
A10 = Gpu(name="NVIDIA A10", sm="sm_86", memory_bytes=24 * 10**9, cuda_version="13.0")
VERSION = "1.7.1.116"


@pytest.fixture
def toy_artifact(tmp_path: Path) -> Artifact:
    """A bundle that NumPy alone has made; no toolkit could read its graph."""
    return Artifact.of_bundle(toy.write(tmp_path / "zoo"))


@pytest.fixture
def place_engine(toy_artifact: Artifact) -> Callable[..., FoundEngine]:
    """Write an engine of random bytes beside the toy bundle's graph; keywords replace fields of its plan."""

    def place(data: bytes | None = None, **changes: Any) -> FoundEngine:
        data = np.random.default_rng(0).bytes(1000) if data is None else data
        return write_engine(toy_artifact.engines_folder, memoryview(data), card_of(toy_artifact, data, **changes))

    return place


def plan_of(artifact: Artifact, **changes: Any) -> EnginePlan:
    fields: dict[str, Any] = {
        "runtime": "tensorrt-rtx",
        "runtime_version": VERSION,
        "targets": ("sm_86", "sm_89"),
        "gpu_name": None,
        "platform": None,
        "precision": "fp32",
        "profile": Profile().add("batch", AxisRange(1, 8, 32)).add("slots", AxisRange(1, 64, 1024)),
        "graph_sha256": artifact.sha256,
        "options": EngineOptions(),
    }
    return EnginePlan(**{**fields, **changes})


def card_of(artifact: Artifact, data: bytes, **changes: Any) -> EngineCard:
    return EngineCard.of(
        plan_of(artifact, **changes),
        layout_digest=None if artifact.layout is None else artifact.layout.digest,
        inputs={"image": Binding(dtype="uint8", shape=("batch", 8, 8, 3))},
        outputs={"logits": Binding(dtype="float32", shape=("batch", "classes"))},
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        build_seconds=1.5,
    )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Gpu | None], None]:
    """Pretend that a GPU, or none, is here."""

    def pretend(gpu: Gpu | None) -> None:
        for module in ("building", "store"):
            monkeypatch.setattr(f"vpdeploy.engines.{module}.find_gpu", lambda: gpu)
        obstacle = None if gpu else "no NVIDIA driver"
        for module in ("building", "store", "target"):
            monkeypatch.setattr(f"vpdeploy.engines.{module}.gpu_obstacle", lambda: obstacle)
        monkeypatch.setattr("vpdeploy.machine.find_gpu", lambda: gpu)

    return pretend


@pytest.fixture
def rtx() -> Toolkit:
    """TensorRT-RTX, which builds engines on any x86-64 machine."""
    if not is_installed("tensorrt-rtx"):
        pytest.skip("needs the rtx extra, whose wheels are for x86-64 Linux and Windows")
    return load_toolkit("tensorrt-rtx")
