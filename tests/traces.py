"""Traces that all tests and workers share: a trace takes seconds and is all that an export costs.

Torch's tracer alone is replaced: what this project does with a trace runs in every test. A trace is found again by
everything that determines it: the module, the example inputs and the tracer's options.

The tracer sees sizes and types of weights, and no numbers; they stand in its answer as they are, or transposed. So
modules that differ only in their weights' numbers share a trace, into which the numbers of each are put, unless the
traced model holds numbers that are computed from weights.

Needs torch and onnx; import it inside a fixture or from tests/export only.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import torch
from filelock import FileLock

trace = torch.onnx.export
"""Torch's own tracer."""

_LARGEST_BYTES = 16 * 2**20
"""Models of deployed size are traced once at most: no test's gain, and a large file."""


class SharedTraces:
    """A stand-in for ``torch.onnx.export`` that traces what none of the workers has traced yet."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def __call__(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], **options: Any) -> Any:
        if sum(tensor.nbytes for tensor in module.state_dict().values()) > _LARGEST_BYTES:
            return trace(module, inputs, **options)
        weights = _Weights.of(module)
        try:
            shared = self._folder / f"{weights.key((module, inputs, options))}.onnx"
            own = self._folder / f"{_key((module, inputs, options), {})}.onnx"
        except (pickle.PicklingError, AttributeError, TypeError):  # a class that a test defines in its body
            return trace(module, inputs, **options)

        places = shared.with_suffix(".json")
        with FileLock(shared.with_suffix(".lock")):
            if not shared.exists() and not own.exists():
                program = trace(module, inputs, **options)
                assert program is not None
                found = weights.places_in(program.model)
                if found is not None:
                    places.write_text(json.dumps(found), encoding="utf-8")
                written = own.with_suffix(".part")
                ir.save(program.model, written)
                written.rename(own if found is None else shared)
        if not shared.exists():
            return SimpleNamespace(model=ir.from_proto(ir.to_proto(ir.load(own))))
        model = ir.from_proto(ir.to_proto(ir.load(shared)))
        weights.put(model, json.loads(places.read_text(encoding="utf-8")))
        return SimpleNamespace(model=model)


Names = dict[tuple[int, torch.Size, tuple[int, ...]], str]
"""Names of weights by address, shape and strides."""

Places = dict[str, tuple[str, list[int]]]
"""Of an initializer, the weight that it is, and the order of the weight's axes in it."""


@dataclass(frozen=True, kw_only=True)
class _Weights:
    """A module's weights as a trace holds them.

    Attributes:
        free: Weights by name whose numbers no trace depends on: of many numbers, not all of them equal. An optimizer
            may drop a sum with zeros or a product with ones.
        firsts: Of every free weight, the first that has the same numbers: an optimizer may merge equal weights.
        fixed: Digests of the other weights, whose numbers are told by a trace's key.
    """

    free: dict[str, torch.Tensor]
    firsts: dict[str, str]
    fixed: set[str]

    @classmethod
    def of(cls, module: torch.nn.Module) -> _Weights:
        free: dict[str, torch.Tensor] = {}
        firsts: dict[str, str] = {}
        fixed: set[str] = set()
        seen: dict[str, str] = {}
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            numbers, digest = tensor.detach(), _digest(tensor)
            if numbers.is_floating_point() and numbers.unique().numel() > 1:
                free[name] = numbers
                firsts[name] = seen.setdefault(digest, name)
            else:
                fixed.add(digest)
        return cls(free=free, firsts=firsts, fixed=fixed)

    def key(self, traced: Any) -> str:
        """Return a digest of all that a trace depends on, of free weights by their names."""
        names = {(each.data_ptr(), each.shape, each.stride()): self.firsts[name] for name, each in self.free.items()}
        return _key(traced, names)

    def places_in(self, model: ir.Model) -> Places | None:
        """Find the free weights in a traced model, or return None where it holds numbers computed from weights."""
        known: dict[tuple[tuple[int, ...], str], list[tuple[str, list[int]]]] = {}
        for name, tensor in self.free.items():
            for order in itertools.permutations(range(tensor.dim())):
                turned = tensor.permute(order)
                known.setdefault((_lengths(turned.shape), _digest(turned)), []).append((name, list(order)))

        places: Places = {}
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            assert tensor is not None
            digest = hashlib.sha256(tensor.tobytes()).hexdigest()
            if not tensor.dtype.is_floating_point() or tensor.size <= 1 or digest in self.fixed:
                continue
            candidates = known.get((_lengths(tensor.shape.numpy()), digest), [])
            if len({(self.firsts[weight], self._moves(weight, order)) for weight, order in candidates}) != 1:
                return None
            places[name] = candidates[0]

        constants = [node.attributes["value"].as_tensor() for node in model.graph if "value" in node.attributes]
        return None if any(each.dtype.is_floating_point() and each.size > 1 for each in constants) else places

    def _moves(self, weight: str, order: list[int]) -> tuple[int, ...]:
        """Return an order of axes without those of length 1, whose place changes nothing."""
        long = [axis for axis, length in enumerate(self.free[weight].shape) if length != 1]
        return tuple(long.index(axis) for axis in order if axis in long)

    def put(self, model: ir.Model, places: Places) -> None:
        """Replace the numbers in a traced model by these."""
        for name, (weight, order) in places.items():
            value = model.graph.initializers[name]
            assert value.const_value is not None
            array = self.free[weight].permute(order).contiguous().reshape(value.const_value.shape.numpy())
            stored = ir.tensor(array, name=name)
            value.const_value = ir.Tensor(stored.numpy(), dtype=stored.dtype, name=name)


def _lengths(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape without its axes of length 1."""
    return tuple(length for length in shape if length != 1)


def _key(traced: Any, names: Names) -> str:
    """Return a digest of all that a trace depends on, of tensors in ``names`` by them."""
    written = io.BytesIO()
    _TensorsByDigest(written, names).dump(traced)
    return hashlib.sha256(written.getvalue()).hexdigest()


def _digest(tensor: torch.Tensor) -> str:
    numbers = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(numbers.tobytes()).hexdigest()


class _TensorsByDigest(pickle.Pickler):
    """Pickling tells storages by address; the same numbers have to give the same bytes in every process."""

    def __init__(self, file: io.BytesIO, names: Names) -> None:
        super().__init__(file, protocol=5)
        self._names = names

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        said = self._names.get((value.data_ptr(), value.shape, value.stride())) or _digest(value)
        return tuple, ((str(value.dtype), tuple(value.shape), value.requires_grad, said),)
