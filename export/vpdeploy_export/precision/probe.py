"""The largest |activation| of every place in a graph, with every task's real prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vpdeploy_export.precision.islands import IslandPart

EMBEDDING: Final = "embedding"
FINAL: Final = "final"

TOKENS: Final = "tokens"
"""The residual stream: a block's input, the rows between attention and MLP, and its output."""

MIXED: Final = "mixed"
"""The heads' outputs before the output projection."""

HIDDEN: Final = "mlp.hidden"
"""What enters any layer inside the MLP."""

WEIGHTS: Final = "weights"
"""Constants of a part, the prompts among those of the attention; they are the same for every image."""


class Place(nn.Identity):
    """A named value inside a block that is no layer's output: passed on. In the written graph it is nothing."""


class ProbedGraph(Protocol):
    """A float32 graph that can be probed: its attention is written as its parts, so that logits can be seen."""

    embedding: nn.Module
    blocks: nn.ModuleList
    final: nn.Module

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return logits, float32 [B, C]."""
        ...


@runtime_checkable
class PromptTensors(Protocol):
    """What a block takes besides its tokens, where it holds tensors of the graph's own type."""

    def typed_tensors(self) -> Iterator[Tensor]:
        """Yield the tensors that have the graph's type."""
        ...


@dataclass(kw_only=True)
class Maxima:
    """Largest absolute values by block, or ``EMBEDDING`` and ``FINAL``, and by place; grows while a graph runs.

    The places of a block are the dotted names of its layers, for what they give, and the names above.
    """

    found: dict[str, dict[str, float]] = field(default_factory=dict)

    def note(self, where: str, place: str, value: Tensor) -> None:
        """Take a value into account; a NaN or an infinity counts as infinity."""
        if not value.is_floating_point() or value.numel() == 0:
            return
        low, high = torch.aminmax(value.detach())
        largest = max(-low.item(), high.item())
        largest = largest if math.isfinite(largest) else math.inf
        places = self.found.setdefault(where, {})
        places[place] = max(places.get(place, 0.0), largest)

    def of(self, block: int) -> dict[str, float]:
        """Return the maxima of a block by place."""
        return self.found.get(block_key(block), {})

    def to_fields(self) -> dict[str, dict[str, float | str]]:
        """Return the JSON form, three digits each."""
        return {
            where: {place: float(f"{value:.3g}") if math.isfinite(value) else "inf" for place, value in places.items()}
            for where, places in self.found.items()
        }


def block_key(block: int) -> str:
    """Return the key of a block's maxima."""
    return f"blocks.{block}"


def part_of(place: str) -> IslandPart:
    """Return the part of a block that a place belongs to."""
    if place == TOKENS or place.startswith("merging"):
        return "residual"
    return "mlp" if place.startswith("mlp") else "attention"


@contextmanager
def watching(graph: ProbedGraph) -> Iterator[Maxima]:
    """Note the largest absolute values while a graph runs.

    Args:
        graph: The graph.

    Yields:
        What was found so far.
    """
    maxima = Maxima()
    handles: list[Any] = []
    try:
        handles += _watch_leaves(graph.embedding, lambda _, value: maxima.note(EMBEDDING, "output", value))
        handles.append(
            graph.embedding.register_forward_hook(lambda _m, _a, output: maxima.note(EMBEDDING, "output", output))
        )
        _note_weights(maxima, EMBEDDING, graph.embedding)
        for index, block in enumerate(graph.blocks):
            handles += _watch_block(maxima, block_key(index), block)
            _note_weights(maxima, block_key(index), block)
        handles += _watch_leaves(graph.final, lambda _, value: maxima.note(FINAL, "output", value))
        handles.append(graph.final.register_forward_hook(lambda _m, _a, output: maxima.note(FINAL, "output", output)))
        _note_weights(maxima, FINAL, graph.final)
        yield maxima
    finally:
        for handle in handles:
            handle.remove()


def _watch_block(maxima: Maxima, where: str, block: nn.Module) -> list[Any]:
    def note_inputs(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        maxima.note(where, TOKENS, inputs[0])
        for each in inputs[1:]:
            if isinstance(each, PromptTensors):
                for value in each.typed_tensors():
                    maxima.note(where, f"attention.{WEIGHTS}", value)

    def note_first_input(place: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, inputs: maxima.note(where, place, inputs[0])

    handles = [block.register_forward_pre_hook(note_inputs)]
    handles.append(block.register_forward_hook(lambda _m, _a, output: maxima.note(where, TOKENS, output)))
    handles += _watch_leaves(block, lambda place, value: maxima.note(where, place, value))
    for name, module in block.named_modules():
        if name == "mlp_norm":
            handles.append(module.register_forward_pre_hook(note_first_input(TOKENS)))
        elif name == "projection":
            handles.append(module.register_forward_pre_hook(note_first_input(MIXED)))
        elif name.startswith("mlp.") and _is_leaf(module):
            handles.append(module.register_forward_pre_hook(note_first_input(HIDDEN)))
    return handles


def _watch_leaves(parent: nn.Module, note: Callable[[str, Tensor], None]) -> list[Any]:
    """Note what every layer of ``parent`` gives, under its dotted name."""

    def hook(place: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _inputs, output: note(place, output)

    return [
        module.register_forward_hook(hook(name)) for name, module in parent.named_modules() if name and _is_leaf(module)
    ]


def _is_leaf(module: nn.Module) -> bool:
    if isinstance(module, Place):
        return True
    return not isinstance(module, (nn.Identity, nn.Dropout)) and next(module.children(), None) is None


def _note_weights(maxima: Maxima, where: str, module: nn.Module) -> None:
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        place = WEIGHTS if where in (EMBEDDING, FINAL) else f"{part_of(name)}.{WEIGHTS}"
        maxima.note(where, place, tensor)
