from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from exports import export_bundle, export_folded

from vpdeploy_export.export import ExportReport
from vpdeploy_export.forms import folded, switchable

Change = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="session", autouse=True)
def _shared_traces(shared_traces: Path) -> None:
    """Every test of this folder exports something."""


@pytest.fixture(scope="session")
def half_folded(tmp_path_factory: pytest.TempPathFactory, tiny_run_paths: dict[str, Path]) -> ExportReport:
    """The run ``flowers`` folded in float16, opset 20."""
    out = tmp_path_factory.mktemp("half") / "flowers.onnx"
    return export_folded(tiny_run_paths["flowers"], out, precision="fp16")


@pytest.fixture(scope="session")
def fused_folded(tmp_path_factory: pytest.TempPathFactory, tiny_run_paths: dict[str, Path]) -> ExportReport:
    """The run ``flowers`` folded in float32, opset 23."""
    out = tmp_path_factory.mktemp("fused") / "flowers.onnx"
    return export_folded(tiny_run_paths["flowers"], out, opset=23)


@pytest.fixture(scope="session")
def half_zoo(tmp_path_factory: pytest.TempPathFactory, tiny_run_paths: dict[str, Path]) -> ExportReport:
    """All the runs as a bundle in float16, opset 20."""
    return export_bundle(list(tiny_run_paths.values()), tmp_path_factory.mktemp("half zoo") / "zoo", precision="fp16")


@pytest.fixture(scope="session")
def fused_zoo(tmp_path_factory: pytest.TempPathFactory, tiny_run_paths: dict[str, Path]) -> ExportReport:
    """All the runs as a bundle in float32, opset 23."""
    return export_bundle(list(tiny_run_paths.values()), tmp_path_factory.mktemp("fused zoo") / "zoo", opset=23)


@pytest.fixture
def traced(zoo: Path, folded_flowers: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Change | None], None]:
    """Replace tracing by the graphs that were traced before, after an optional change; tracing takes seconds."""

    def use(change: Change | None = None) -> None:
        def load(path: Path) -> ir.Model:
            model = onnx.load(path)
            del model.metadata_props[:]
            if change is not None:
                change(model)
            return ir.from_proto(model)

        monkeypatch.setattr(folded, "build_folded", lambda *_, **__: load(folded_flowers))
        monkeypatch.setattr(switchable, "build_switchable", lambda *_, **__: load(zoo / "model.onnx"))

    use()
    return use
