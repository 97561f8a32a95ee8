"""The table of a switchable graph inside the graph: as defaults that a run may override, or as constants."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vpdeploy.format.layout import BATCH_AXIS, LOGITS
from vpdeploy.format.tensorfile import Tensors

FREE_INITIALIZERS_IR_VERSION: Final = 4
"""From this IR version on, an initializer need not be an input; one that is, is a default that a run may override."""


class TableDefaultsPass(ir.passes.InPlacePass):
    """Give the table inputs a default: slots that a run may override with others, of any length.

    Rules:

    1. Every named input stays an input, and its tensor becomes an initializer of the same name. Its number of slots is
       the tensor's from then on; its other named sizes stay dynamic, so that an override may have other ones.
    2. An input that has this very default already is left.
    3. Inputs that are not named, such as ``image`` and ``slot``, are left without a default.
    4. A name that is no input of the graph, a constant among them, is refused: nothing could override it. So is a
       tensor of another type, number of axes or fixed size than the input's.
    5. The IR version is raised to the first that has such defaults; a newer one stays.

    Args:
        tensors: Slots by input name, [S, ...]; here S is 1 where a run is of one task.
    """

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        self.tensors = tensors

    def requires(self, model: ir.Model) -> None:
        """Refuse tensors that are none of this graph's inputs."""
        inputs = _inputs(model)
        for name, array in self.tensors.items():
            _require_fit(name, array, inputs)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Register the defaults in place."""
        modified = _free_initializers(model)
        inputs = _inputs(model)
        for name, array in self.tensors.items():
            value = inputs[name]
            if value.is_initializer() and _holds(value, array):
                continue
            others = [] if value.shape is None else value.shape.dims[1:]
            value.shape = ir.Shape([len(array), *others])
            value.const_value = ir.Tensor(array, name=name)
            model.graph.register_initializer(value)
            modified = True
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """Check that every named tensor is input and initializer."""
        for name in self.tensors:
            if name not in _inputs(model) or name not in model.graph.initializers:
                raise ir.passes.PostconditionError(f"'{name}' is no input with a default")


class TableConstantsPass(ir.passes.InPlacePass):
    """Turn the table inputs into constants.

    Rules:

    1. Every named input is taken away, and its array becomes an initializer of the same name.
    2. A name that is this very constant already is left.
    3. ``logits`` has as many columns as the table has classes afterwards.
    4. Inputs that are not named are left.
    5. A name that is neither an input nor this very constant is refused: another constant would be lost. So is an
       array of another type, number of axes or fixed size than the input's, and a graph without ``logits``.
    6. The IR version is raised to the first in which a constant need not be an input; a newer one stays.

    Args:
        arrays: The table by input name, [S, ...].
        classes: C of the table.
    """

    def __init__(self, arrays: Tensors, classes: int) -> None:
        super().__init__()
        self.arrays = arrays
        self.classes = classes

    def requires(self, model: ir.Model) -> None:
        """Refuse arrays that are none of this graph's inputs, and a graph without ``logits``."""
        inputs = _inputs(model)
        for name, array in self.arrays.items():
            if not self._is_constant(model, name):
                _require_fit(name, array, inputs)
        if all(output.name != LOGITS for output in model.graph.outputs):
            raise ir.passes.PreconditionError(f"the graph has no output '{LOGITS}'")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Take the table inputs from the graph's inputs, in place."""
        modified = _free_initializers(model)
        inputs = _inputs(model)
        for name, array in self.arrays.items():
            if self._is_constant(model, name):
                continue
            value = inputs[name]
            model.graph.inputs.remove(value)
            value.shape = ir.Shape(array.shape)
            value.const_value = ir.Tensor(array, name=name)
            model.graph.register_initializer(value)
            modified = True
        shape = ir.Shape([BATCH_AXIS, self.classes])
        for output in model.graph.outputs:
            if output.name == LOGITS and output.shape != shape:
                output.shape = shape
                modified = True
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """Check that every named array is a constant."""
        for name in self.arrays:
            if not self._is_constant(model, name):
                raise ir.passes.PostconditionError(f"'{name}' is no constant")

    def _is_constant(self, model: ir.Model, name: str) -> bool:
        value = model.graph.initializers.get(name)
        return value is not None and not value.is_graph_input() and _holds(value, self.arrays[name])


def _inputs(model: ir.Model) -> dict[str, ir.Value]:
    return {value.name or "": value for value in model.graph.inputs}


def _free_initializers(model: ir.Model) -> bool:
    """Raise the IR version where initializers had to be inputs; tell whether it was."""
    version = max(model.ir_version, FREE_INITIALIZERS_IR_VERSION)
    raised = version != model.ir_version
    model.ir_version = version
    return raised


def _require_fit(name: str, array: npt.NDArray[np.generic], inputs: dict[str, ir.Value]) -> None:
    """Refuse an array that a graph's input of that name cannot take.

    Raises:
        PreconditionError: There is no such input, or its type or shape is another.
    """
    value = inputs.get(name)
    if value is None:
        raise ir.passes.PreconditionError(f"the graph has no input '{name}'")
    found = ir.DataType.from_numpy(array.dtype)
    if value.dtype != found:
        raise ir.passes.PreconditionError(f"input '{name}' is {value.dtype}, its tensor {found}")
    wanted = () if value.shape is None else tuple(value.shape.dims)
    sizes = zip(wanted[1:], array.shape[1:], strict=False)
    if len(wanted) != array.ndim or any(isinstance(size, int) and size != own for size, own in sizes):
        raise ir.passes.PreconditionError(f"input '{name}' has shape {value.shape}, its tensor {array.shape}")


def _holds(value: ir.Value, array: npt.NDArray[np.generic]) -> bool:
    """Tell whether an initializer has exactly these numbers."""
    held = value.const_value
    return (
        held is not None
        and held.dtype == ir.DataType.from_numpy(array.dtype)
        and bool(np.array_equal(held.numpy(), array))
    )
