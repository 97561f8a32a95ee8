from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from core.backends.cases import CASES, ON_HOST
from core.backends.native_host import open_host
from core.backends.tables import Reference

from vpdeploy.backends import RUNTIMES, open_backend
from vpdeploy.backends.protocol import Backend
from vpdeploy.format.artifact import Artifact
from vpdeploy.machine import find_gpu


@pytest.fixture(scope="session")
def artifact(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Of a bundle of these tests' own: on a GPU they build engines beside it."""
    return Artifact.open(Path(shutil.copytree(zoo, tmp_path_factory.mktemp("runtimes") / "zoo")))


@pytest.fixture(scope="session")
def reference(artifact: Artifact) -> Reference:
    return Reference(artifact)


@pytest.fixture(params=CASES)
def runtime(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tolerance(runtime: str) -> dict[str, float]:
    """A GPU multiplies float32 matrices in TF32 (10 bits of mantissa)."""
    return {"rtol": 1e-5, "atol": 1e-5} if runtime in ("onnxruntime-cpu", *ON_HOST) else {"rtol": 2e-2, "atol": 2e-2}


@pytest.fixture
def open_runtime(runtime: str, tmp_path: Path) -> Iterator[Callable[[Artifact], Backend]]:
    """Opens a graph with the runtime that the test is run for, or skips where that does not work."""
    opened: list[Backend] = []

    def open_graph(artifact: Artifact) -> Backend:
        if runtime in ON_HOST:
            backend: Backend = open_host(artifact, tmp_path / "engines", runtime=runtime.removeprefix("host ")).backend
        else:
            _build_engine(artifact, runtime)
            if obstacle := RUNTIMES[runtime].obstacle(artifact):
                pytest.skip(f"{runtime}: {obstacle}")
            backend = open_backend(artifact, runtime=runtime, threads=1)
        opened.append(backend)
        return backend

    yield open_graph
    for backend in opened:
        backend.close()


def _build_engine(artifact: Artifact, runtime: str) -> None:
    """Build an engine for this machine's GPU where the runtime needs one and knows the GPU."""
    from vpdeploy.engines.building import BuildRequest, build_engine
    from vpdeploy.engines.target import supported_targets
    from vpdeploy.engines.toolkit import TOOLKITS, is_installed, load_toolkit

    gpu = find_gpu()
    if runtime not in TOOLKITS or gpu is None or not is_installed(runtime):
        return
    if TOOLKITS[runtime].ahead_of_time and gpu.sm not in supported_targets(load_toolkit(runtime)):
        pytest.skip(f"{runtime} builds nothing for {gpu.name} ({gpu.sm})")
    build_engine(artifact, BuildRequest(runtime=runtime))


@pytest.fixture
def backend(artifact: Artifact, open_runtime: Callable[[Artifact], Backend]) -> Backend:
    return open_runtime(artifact)
