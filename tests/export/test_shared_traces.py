"""The traces that tests share are those that torch's tracer would have made for each of them."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import torch
import traces
from torch import Tensor, nn


class Scaled(nn.Module):
    """A norm, two transposed weights, which are equal on request, and a bias."""

    def __init__(self, seed: int, *, ties: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.norm = nn.LayerNorm(4)
        self.first, self.second = (nn.Parameter(torch.randn(4, 4, generator=generator)) for _ in range(2))
        if ties:
            self.second = nn.Parameter(self.first.detach().clone())
        self.bias = nn.Parameter(torch.randn(4, generator=generator))
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) @ self.first.T @ self.second.T + self.bias


class Doubled(Scaled):
    """The tracer's optimizer may compute the sum of two weights."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.first + self.second) + self.bias


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules that reached torch's tracer."""
    seen: list[nn.Module] = []
    real = traces.trace

    def trace(module: nn.Module, *arguments: object, **options: object) -> object:
        seen.append(module)
        return real(module, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(traces, "trace", trace)
    return seen


def trace(export: object, module: nn.Module, path: Path) -> bytes:
    program = export(module, (torch.zeros(2, 4),), dynamo=True, opset_version=20, verbose=False)  # type: ignore[operator]
    ir.save(program.model, path)
    return ir.to_proto(ir.from_proto(ir.to_proto(ir.load(path)))).SerializeToString(deterministic=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("module", "shares"), [(Scaled, True), (Doubled, False)])
def test_a_shared_trace_is_the_one_that_the_module_alone_would_have(tmp_path, traced, module, shares):
    shared = traces.SharedTraces(tmp_path / "traces")
    trace(shared, module(1), tmp_path / "x.onnx")
    found = trace(shared, module(2), tmp_path / "x.onnx")
    assert len(traced) == (1 if shares else 2)
    assert found == trace(traces.SharedTraces(tmp_path / "other"), module(2), tmp_path / "x.onnx")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_weights_that_are_equal_in_one_module_alone_share_no_trace(tmp_path, traced):
    shared = traces.SharedTraces(tmp_path / "traces")
    trace(shared, Scaled(1), tmp_path / "x.onnx")
    trace(shared, Scaled(1, ties=True), tmp_path / "x.onnx")
    assert len(traced) == 2
    trace(shared, Scaled(2, ties=True), tmp_path / "x.onnx")
    assert len(traced) == 2
