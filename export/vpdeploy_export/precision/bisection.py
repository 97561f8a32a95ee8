"""Where a narrow graph first leaves tolerance: every value against the same graph with its arithmetic in float32."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from vpdeploy.backends.providers import open_session
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.layout import IMAGE, SLOT
from vpdeploy.image import normalise
from vpdeploy.table import Table
from vpdeploy_export.onnx.save import save_model
from vpdeploy_export.parity import TOLERANCES, Expectation
from vpdeploy_export.passes import ExposePass
from vpdeploy_export.passes.narrow import moves_only
from vpdeploy_export.precision.islands import IslandPart
from vpdeploy_export.precision.probe import part_of
from vpdeploy_export.precision.twins import rounded_twin, wide_twin

_IMAGES: Final = 32
_BATCH: Final = 2  # every value of the graph is kept at once

_Feed = dict[str, npt.NDArray[np.generic]]
_BLOCK: Final = re.compile(r"blocks\.(\d+)\.(.+)")
_STEPS: Final = 6  # from the logits' product to the softmax: a cast, a mask, parts joined
_BETWEEN: Final = frozenset({"Cast", "Add", "Mul", "Concat", "Reshape", "Transpose", "Pad"})


@dataclass(frozen=True, kw_only=True)
class Location:
    """A value's place.

    Attributes:
        block: The block, 0 to L - 1; None before the first and behind the last.
        part: The part of the block, or ``embedding`` or ``head`` outside of the blocks.
        name: The value's name in the graph.
    """

    block: int | None
    part: IslandPart | str
    name: str

    def describe(self) -> str:
        """Return it in words, e.g. ``block 3, mlp (blocks.3.mlp.fc1.MatMul)``."""
        return f"{self.part} ({self.name})" if self.block is None else f"block {self.block}, {self.part} ({self.name})"


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """How far one value is from float32.

    Attributes:
        location: The value's place in the model.
        relative_error: The largest difference as a share of the largest float32 magnitude; infinite where the value is
            not finite and float32's is.
        largest: The largest float32 magnitude.
    """

    location: Location
    relative_error: float
    largest: float

    def to_fields(self) -> dict[str, Any]:
        """Return the JSON form; what is not finite is null."""
        return {
            "value": self.location.name,
            "block": self.location.block,
            "part": self.location.part,
            "relative_error": self.relative_error if math.isfinite(self.relative_error) else None,
            "largest": self.largest if math.isfinite(self.largest) else None,
        }


@dataclass(frozen=True, kw_only=True)
class Bisection:
    """Every value's deviation, in the order in which the graph computes them.

    Attributes:
        deviations: One for each computed value.
        tolerance: The largest deviation that the precision allows, as a share of the largest magnitude.
        images: How many images were run.
    """

    deviations: tuple[Deviation, ...]
    tolerance: float
    images: int

    @property
    def first(self) -> Deviation | None:
        """The first value out of tolerance."""
        return next((each for each in self.deviations if not each.relative_error <= self.tolerance), None)

    def worst_by_part(self) -> list[Deviation]:
        """Return the worst value of each part of each block, in order."""
        worst: dict[tuple[int | None, str], Deviation] = {}
        for each in self.deviations:
            key = each.location.block, each.location.part
            if key not in worst or each.relative_error > worst[key].relative_error:
                worst[key] = each
        return list(worst.values())

    def describe(self) -> str:
        """Return in one clause where tolerance is left."""
        first = self.first
        if first is None:
            return f"no value of the graph is further than {self.tolerance:.0e} of its largest from float32"
        what = (
            f"differs from float32 by {first.relative_error:.2g} of its largest value (allowed {self.tolerance:.0e})"
            if math.isfinite(first.relative_error)
            else f"is not finite where float32 reaches {first.largest:.3g}"
        )
        return f"{first.location.describe()} is the first value out of tolerance: it {what}"

    def to_fields(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "tolerance": self.tolerance,
            "images": self.images,
            "first": None if self.first is None else self.first.to_fields(),
            "values": [each.to_fields() for each in self.deviations],
        }


def bisect(artifact: Artifact, expectations: Sequence[Expectation]) -> Bisection:
    """Run a graph rounded after every operation and in float32, and compare all values on the way.

    Args:
        artifact: The graph as it was written, with the tasks to run; in a float32 graph there is nothing to find.
        expectations: They give the images; their answers are not used.

    Raises:
        BackendError: ONNX Runtime cannot run the graph.
        ExportError: The type of a value is unknown.
    """
    rounded, wide = rounded_twin(artifact.graph_path, artifact.precision), wide_twin(artifact.graph_path)
    locations = _watched(ir.load(artifact.graph_path))
    errors, largest = dict.fromkeys(locations, 0.0), dict.fromkeys(locations, 0.0)
    images = 0
    with TemporaryDirectory(prefix="vpdeploy-bisect-") as folder:
        narrow_run = _open(rounded, list(locations), Path(folder) / "rounded.onnx")
        wide_run = _open(wide, list(locations), Path(folder) / "wide.onnx")
        for feed in _feeds(artifact, expectations):
            images += len(feed[IMAGE])
            found, reference = (run.run(list(locations), feed) for run in (narrow_run, wide_run))
            for name, one, other in zip(locations, found, reference, strict=True):
                errors[name] = max(errors[name], _largest_difference(one, other))
                largest[name] = max(largest[name], float(np.abs(other).max(initial=0.0)))
    return Bisection(
        deviations=tuple(
            Deviation(
                location=location,
                relative_error=errors[name] / largest[name] if largest[name] > 0 else errors[name],
                largest=largest[name],
            )
            for name, location in locations.items()
        ),
        tolerance=TOLERANCES[artifact.precision].exported,
        images=images,
    )


def _watched(model: ir.Model) -> dict[str, Location]:
    """Return the places of all floating-point values that an operation computes, by name, in the graph's order."""
    return {
        value.name or "": locate(node, value)
        for node in model.graph
        if not moves_only(node) and node.op_type != "Cast"
        for value in node.outputs
        if value.dtype is not None and value.dtype.is_floating_point()
    }


def _open(model: ir.Model, names: Sequence[str], path: Path) -> Any:
    """Load a graph that also gives the named values."""
    save_model(ExposePass(names)(model).model, path)
    return open_session(path, threads=torch.get_num_threads())


def _feeds(artifact: Artifact, expectations: Sequence[Expectation]) -> list[_Feed]:
    """Return small batches of the images, equally many of each task."""
    prompt_sets = artifact.read_prompt_sets()
    arrays: _Feed = dict(Table.of(prompt_sets).arrays) if prompt_sets else {}
    slots = {task: slot for slot, task in enumerate(artifact.tasks)}
    count = max(1, _IMAGES // len(expectations))
    feeds = []
    for expectation in expectations:
        pixels = expectation.pixels[:: max(1, len(expectation.pixels) // count)][:count]
        for start in range(0, len(pixels), _BATCH):
            batch = np.ascontiguousarray(pixels[start : start + _BATCH])
            image = batch if artifact.image_input == "uint8" else normalise(batch, artifact.preprocessing)
            feed: _Feed = {IMAGE: image, **arrays}
            if artifact.is_switchable:
                feed[SLOT] = np.full(len(batch), slots[expectation.task], dtype=np.int32)
            feeds.append(feed)
    return feeds


def _largest_difference(found: npt.NDArray[np.float32], reference: npt.NDArray[np.float32]) -> float:
    """Return the largest difference; infinite where only ``found`` is not finite."""
    if not np.isfinite(found).all():
        return math.inf
    return float(np.abs(found - reference).max(initial=0.0))


def locate(node: ir.Node, value: ir.Value) -> Location:
    """Return the place of a value by its node's name, which is that of the module it was traced in."""
    name = value.name or ""
    match = _BLOCK.match(node.name or "")
    if match is None:
        return Location(
            block=None, part="embedding" if (node.name or "").startswith("embedding") else "head", name=name
        )
    module, _, _operator = match[2].rpartition(".")
    return Location(block=int(match[1]), part=part_of(module) if module else _part_without_module(node), name=name)


def _part_without_module(node: ir.Node) -> IslandPart:
    """Tell a residual addition from what attention does between its layers."""
    computed = [each for each in node.inputs if each is not None and each.producer() is not None]
    if node.op_type == "Add" and len(computed) == len(node.inputs) and not leads_to_softmax(node):
        # Behind a layer's own product of three axes its bias is added too, but that is a constant.
        return "residual"
    return "attention"


def leads_to_softmax(node: ir.Node) -> bool:
    """Tell whether an operation's result reaches a softmax by casts, masks and joins alone."""
    reached = [node]
    for _ in range(_STEPS):
        consumers = [user for each in reached for output in each.outputs for user in output.consumers()]
        if any(user.op_type == "Softmax" for user in consumers):
            return True
        reached = [user for user in consumers if user.op_type in _BETWEEN]
    return False
