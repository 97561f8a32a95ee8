"""Fixtures that several folders share; torch is imported only where a fixture needs it."""

from __future__ import annotations

import os

# One thread per process: the workers fill the cores. Read when OpenMP is loaded, and by processes that tests start.
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Run a named file in this process, whose output is seen at once; workers would each build its fixtures."""
    return 0 if config.args and all(".py" in argument for argument in config.args) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="takes several minutes with its like; run it with --slow"))


@pytest.fixture(autouse=True)
def _own_logger() -> Iterator[None]:
    """Leave the package's logger as it was: verbs that run in this process send its lines to stderr alone."""
    logger = logging.getLogger("vpdeploy")
    handlers, level, propagates = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagates
    logger.setLevel(level)


@pytest.fixture(scope="session")
def shared_traces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Let each graph be traced once, by one of the workers; the next who ask for the same trace get its file.

    The folder of the files is for processes that tests start.
    """
    pytest.importorskip("onnxscript", reason="needs the export extra")
    import torch
    from traces import SharedTraces

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", SharedTraces(folder / "traces"))
        yield folder / "traces"


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a tiny random vision transformer."""
    pytest.importorskip("timm", reason="needs the train extra")
    import tiny_runs

    return tiny_runs.write_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="session")
def tiny_run_paths(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> dict[str, Path]:
    """Run folders by task name: ``flowers`` (4 classes), ``birds`` (7) and ``probe`` (2, without prompts)."""
    import tiny_runs

    return tiny_runs.write_runs(tmp_path_factory.mktemp("runs"), tiny_weights)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory, tiny_run_paths: dict[str, Path], shared_traces: Path) -> Path:
    """A bundle of all the runs, float32, opset 20; no test changes it."""
    from exports import export_bundle

    return export_bundle(list(tiny_run_paths.values()), tmp_path_factory.mktemp("zoo") / "zoo").path


@pytest.fixture(scope="session")
def folded_flowers(
    tmp_path_factory: pytest.TempPathFactory, tiny_run_paths: dict[str, Path], shared_traces: Path
) -> Path:
    """The run ``flowers`` as one ONNX file, float32, opset 20; no test changes it."""
    from exports import export_folded

    return export_folded(tiny_run_paths["flowers"], tmp_path_factory.mktemp("folded") / "flowers.onnx").path


@pytest.fixture
def zoo_copy(zoo: Path, tmp_path: Path) -> Path:
    """A bundle that the test may change."""
    return Path(shutil.copytree(zoo, tmp_path / "zoo"))


@pytest.fixture(scope="session")
def random_pixels() -> Callable[..., npt.NDArray[np.uint8]]:
    """Images by count: uint8 [B, side, side, 3], always the same."""

    def make(count: int, *, side: int = 32, seed: int = 0) -> npt.NDArray[np.uint8]:
        return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)

    return make
