"""What a CPU runs in a narrow graph's place: rounded after every operation, or float32 throughout."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import onnx_ir as ir
import torch

from vpdeploy.backends.ort import CPU_PROVIDER, OrtBackend
from vpdeploy.format.graphfacts import Precision
from vpdeploy_export.onnx.save import save_model
from vpdeploy_export.passes import RoundPass, WidenPass
from vpdeploy_export.passes.narrow import TITLES, TYPES, narrow_results

CPU_RUNTIME: Final = "onnxruntime-cpu"


def rounded_twin(path: Path, precision: Precision) -> ir.Model:
    """Return a graph in float32 whose values are rounded to ``precision`` wherever the written graph has that type.

    Raises:
        ExportError: The type of a value is unknown.
    """
    model = ir.load(path)
    dtype = TYPES.get(precision)
    if dtype is None:
        return model
    names = narrow_results(model, dtype)
    return RoundPass(names, dtype)(WidenPass()(model).model).model


def wide_twin(path: Path) -> ir.Model:
    """Return a graph with the same weights and all arithmetic in float32."""
    return WidenPass()(ir.load(path)).model


class TwinBackend(OrtBackend):
    """ONNX Runtime on a twin of a graph; reports name it, so that nobody takes it for the graph itself.

    Args:
        twin: The graph to run.
        path: A file to write it to; it may be deleted once the backend is open.
        title: The name that reports give to the backend.
    """

    def __init__(self, twin: ir.Model, path: Path, *, title: str) -> None:
        save_model(twin, path)
        super().__init__(
            path,
            provider=CPU_PROVIDER,
            threads=torch.get_num_threads(),
            reason="stands in for the graph's own precision",
        )
        self._title = title

    @property
    def name(self) -> str:
        """The name that reports give to the backend."""
        return self._title


def open_rounded(path: Path, precision: Precision, folder: Path) -> TwinBackend:
    """Run a graph on the CPU, rounded after every operation.

    Args:
        path: The ONNX file.
        precision: The precision of the graph in that file.
        folder: Where the twin's file lies while it is opened.
    """
    title = f"{CPU_RUNTIME}, {TITLES[precision]} emulated"
    return TwinBackend(rounded_twin(path, precision), folder / "rounded.onnx", title=title)


def open_wide(path: Path, folder: Path) -> TwinBackend:
    """Run a graph on the CPU with all arithmetic in float32.

    Args:
        path: The ONNX file.
        folder: Where the twin's file lies while it is opened.
    """
    return TwinBackend(wide_twin(path), folder / "wide.onnx", title=f"{CPU_RUNTIME}, float32")
