"""Tracing a graph module into an ONNX model."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any, Final

import onnx_ir as ir
import torch
from onnx_ir.passes import Sequential
from onnx_ir.passes.common import (
    CheckerPass,
    ClearMetadataAndDocStringPass,
    CommonSubexpressionEliminationPass,
    RemoveUnusedNodesPass,
    ShapeInferencePass,
)

from vpdeploy import __version__
from vpdeploy.errors import ExportError, SpecError
from vpdeploy.format.layout import (
    BATCH_AXIS,
    CLASS_AXIS,
    GENERATED_AXIS,
    HIDDEN_AXIS,
    IMAGE,
    LOGITS,
    PREFIX_AXIS,
    SLOT,
    SLOT_AXIS,
    Layout,
)
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy.table import Table
from vpdeploy_export.passes import NameByModulePass

if TYPE_CHECKING:  # the graphs stand on precision, which writes graphs: here their types alone are needed
    from vpdeploy_export.graph import FoldedGraph, SwitchableGraph

OPSETS: Final = (20, 23)
"""20 has ``Gelu`` and one ``LayerNormalization``; 23 adds ``Attention``."""

# Sizes that differ from each other and from every size of the graph's own, so that the tracer does not equate them.
_EXAMPLE_SIZES: Final = {PREFIX_AXIS: 8, GENERATED_AXIS: 6, HIDDEN_AXIS: 7, CLASS_AXIS: 5}


_PASSES: Final = Sequential(
    CommonSubexpressionEliminationPass(),
    RemoveUnusedNodesPass(),
    NameByModulePass(),
    ClearMetadataAndDocStringPass(),
    ShapeInferencePass(),
    CheckerPass(full_check=True),
)
"""What every graph goes through, in this order."""


def check_opset(opset: int) -> None:
    """Refuse an opset that the graphs are not written for.

    Raises:
        SpecError: It is not one of ``OPSETS``.
    """
    if opset not in OPSETS:
        raise SpecError(f"--opset {opset}: choose one of {', '.join(map(str, OPSETS))}")


def build_folded(graph: FoldedGraph, preprocessing: Preprocessing, *, opset: int) -> ir.Model:
    """Return the ONNX model of a folded graph: input ``image``, output ``logits``, dynamic batch.

    Raises:
        ExportError: The graph cannot be expressed in ONNX.
    """
    batch = torch.export.Dim(BATCH_AXIS)
    size, count = preprocessing.image_size, 2
    if graph.image_input == "uint8":
        image = torch.zeros(count, size, size, 3, dtype=torch.uint8)
    else:
        image = torch.zeros(count, 3, size, size)
    return trace_module(graph, (image,), [IMAGE], ({0: batch},), opset)


def build_switchable(graph: SwitchableGraph, preprocessing: Preprocessing, layout: Layout, *, opset: int) -> ir.Model:
    """Return the ONNX model of a switchable graph: image, slot and the layout's table inputs, all with dynamic sizes.

    Raises:
        ExportError: The graph cannot be expressed in ONNX.
    """
    example = Table(layout, {name: _EXAMPLE_SIZES[name] for name in layout.axes}, slots=3)
    dims = {name: torch.export.Dim(name) for name in (BATCH_AXIS, SLOT_AXIS, *layout.axes)}
    size = preprocessing.image_size
    inputs = [torch.zeros(2, size, size, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int32)]
    shapes: list[dict[int, Any]] = []
    for spec in layout.tensors:
        inputs.append(torch.from_numpy(example.arrays[spec.name]))
        named = {axis + 1: dims[size] for axis, size in enumerate(spec.shape) if isinstance(size, str)}
        shapes.append({0: dims[SLOT_AXIS], **named})
    names = [IMAGE, SLOT, *(spec.name for spec in layout.tensors)]
    dynamic = ({0: dims[BATCH_AXIS]}, {0: dims[BATCH_AXIS]}, tuple(shapes))  # the table is one variadic argument
    return trace_module(graph, tuple(inputs), names, dynamic, opset)


def trace_module(
    graph: torch.nn.Module,
    inputs: tuple[torch.Tensor, ...],
    names: list[str],
    shapes: tuple[Any, ...],
    opset: int,
) -> ir.Model:
    """Trace a module, strip what only the tracer needs, and check the result."""
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    try:
        exporter_log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            # Inputs share their dynamic sizes on purpose; the exporter remarks on every one.
            warnings.filterwarnings("ignore", message="# The axis name: .* will not be used", category=UserWarning)
            # Raised inside torch.export by its own use of copyreg-era pytree registration.
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\..*")
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            program = torch.onnx.export(
                graph,
                inputs,
                dynamo=True,
                opset_version=opset,
                input_names=names,
                output_names=[LOGITS],
                dynamic_shapes=shapes,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = " ".join(str(error).split())[:300]
        raise ExportError(f"the graph cannot be written as ONNX opset {opset}: {reason}") from error
    finally:
        exporter_log.setLevel(level)
    if program is None:
        raise ExportError("the ONNX exporter returned nothing")
    model = _PASSES(program.model).model
    model.producer_name, model.producer_version = "vpdeploy", __version__
    model.metadata_props.clear()
    return model
