from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from core import toy

from vpdeploy.backends import RUNTIMES, Runtime
from vpdeploy.errors import MissingExtraError
from vpdeploy.inspection import report
from vpdeploy.inspection.rendering import blocks_text, render_text
from vpdeploy.inspection.report import inspect_path

FACTS = {
    "nodes": 421,
    "parameters": 85_800_000,
    "initializer_bytes": 171_600_000,
    "elements": {"float16": 85_700_000, "float32": 100_000, "int64": 24},
    "macs_per_image": 17_560_000_000,
    "operators": {"Gemm": 49, "Softmax": 12, "MatMul": 49},
    "blocks": [
        {"name": "blocks.0", "matmul": "float16", "norm": "float16", "softmax": "float32"},
        {"name": "blocks.1", "matmul": "float16", "norm": "float16", "softmax": "float32"},
        {"name": "blocks.2", "matmul": "float32", "norm": "float16", "softmax": "float32"},
    ],
}
PRECISION = {
    "type": "fp16",
    "float32": {"blocks.2": ["mlp"]},
    "probe": {"largest": 65504.0, "maxima": {"blocks.1": {"mlp": 12.0, "norm": 7.5}, "blocks.2": {"mlp": "inf"}}},
}


def write_zoo(path: Path, details: dict[str, Any], *, precision: str = "fp16") -> Path:
    """A toy bundle whose manifest records facts of its graph."""
    toy.write(path)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["graph"] |= {"details": details, "precision": precision}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def test_what_the_export_recorded_is_reported(tmp_path: Path):
    graph = inspect_path(write_zoo(tmp_path / "zoo", {"graph": FACTS, "precision": PRECISION})).to_json()["graph"]
    assert {name: graph[name] for name in FACTS} == FACTS
    assert graph["float32_parts"] == {"blocks.2": ["mlp"]}
    assert graph["probe"] == PRECISION["probe"]
    assert graph["external_data"] is None


def test_what_an_older_export_did_not_record_is_said(tmp_path: Path):
    graph = inspect_path(write_zoo(tmp_path / "zoo", {"graph": {"nodes": 421}})).graph.recorded
    assert graph["nodes"] == 421
    missing = ("parameters", "initializer_bytes", "elements", "macs_per_image", "operators", "blocks", "float32_parts")
    assert {graph[name] for name in missing} == {"not recorded"}
    assert "float32_parts" not in inspect_path(write_zoo(tmp_path / "plain", {}, precision="fp32")).graph.recorded


def test_the_json_form_of_a_bundle_lists_its_parts_in_order(tmp_path: Path):
    fields = inspect_path(write_zoo(tmp_path / "zoo", {"graph": FACTS})).to_json()
    assert json.loads(json.dumps(fields)) == fields
    assert list(fields) == [
        *("kind", "path", "graph", "backbone", "preprocessing", "layout", "tasks", "engines", "runtimes", "machine"),
        "damage",
    ]
    assert list(fields["graph"])[:6] == ["file", "size_bytes", "external_data", "precision", "opset", "sha256"]
    assert list(fields["layout"]) == ["family", "digest", "tensors"]
    assert list(fields["tasks"][0]) == [
        *("name", "version", "method", "classes", "prefix", "generated", "size_bytes", "val_accuracy", "parity"),
    ]
    assert list(fields["machine"]) == ["cpu", "cores", "system", "gpu", "gpu_obstacle"]


@pytest.mark.parametrize(
    "details",
    [
        {"graph": None, "precision": 3},
        {"graph": {"blocks": "x", "operators": [1], "parameters": "many"}},
        {"graph": {"blocks": [1], "operators": {"Gemm": "x"}}, "precision": {"probe": {"maxima": {"a": 3}}}},
        {"graph": {"blocks": [{}], "operators": {}}, "notes": {"by": ["hand"]}},
    ],
    ids=str,
)
def test_text_is_not_confused_by_facts_of_another_shape(tmp_path: Path, details: dict[str, Any]):
    assert "kind: bundle" in render_text(inspect_path(write_zoo(tmp_path / "zoo", details)))


def test_text_draws_equal_blocks_and_big_numbers_together(tmp_path: Path):
    text = render_text(inspect_path(write_zoo(tmp_path / "zoo", {"graph": FACTS, "precision": PRECISION})))
    for line in (
        "  parameters: 85.8 M",
        "  weights: 172 MB",
        "  elements: 85.7 M float16, 100 k float32, 24 int64",
        "  multiply-accumulates per image: 17.6 G",
        "  operators: Gemm 49, MatMul 49, Softmax 12",
        "  blocks: blocks.0 to blocks.1: matmul float16, norm float16, softmax float32; "
        "blocks.2: matmul float32, norm float16, softmax float32",
        "    maxima: blocks.1 12, blocks.2 inf",
        "    blocks.2: [mlp]",
        "  external data: none",
        "engines: none",
    ):
        assert line in text.splitlines()


def test_prompt_bytes_are_reported_for_each_task(tmp_path: Path):
    path = toy.write(tmp_path / "zoo").path
    sizes = {task.name: task.size_bytes for task in inspect_path(path).tasks}
    assert sizes == {
        "flowers": toy.prompt_set(prefix=3).size_bytes,
        "birds": toy.prompt_set(prefix=5, classes=2).size_bytes,
    }


def test_blocks_that_differ_stay_apart():
    blocks = [{"name": f"blocks.{index}", "matmul": kind} for index, kind in enumerate("aab")]
    assert blocks_text(blocks) == "blocks.0 to blocks.1: matmul a; blocks.2: matmul b"


def test_every_runtime_says_whether_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def missing(graph: object) -> str | None:
        raise MissingExtraError("onnxruntime", "all")

    def unopened(*_: object) -> Any:
        raise AssertionError("a report loads no graph")

    table = {
        "fast": Runtime(obstacle=lambda graph: "no GPU", open=unopened),
        "broken": Runtime(obstacle=missing, open=unopened),
        "slow": Runtime(obstacle=lambda graph: None, open=unopened),
    }
    monkeypatch.setattr(report, "RUNTIMES", table)
    assert inspect_path(toy.write(tmp_path / "zoo").path).host.runtimes == {
        "fast": "no GPU",
        "broken": "'onnxruntime' is not installed: pip install 'vpdeploy[all]'",
        "slow": "works",
    }


def test_the_real_runtimes_are_all_reported(folded_flowers: Path):
    found = inspect_path(folded_flowers).host.runtimes
    assert set(found) == set(RUNTIMES)
    assert found["onnxruntime-cpu"] == "works"


def test_the_input_of_a_folded_model_is_reported_as_recorded(tiny_run_paths: dict[str, Path], tmp_path: Path):
    from exports import export_folded

    path = export_folded(tiny_run_paths["probe"], tmp_path / "probe.onnx", image_input="float").path
    assert inspect_path(path).input == "image float32 [B, 3, H, W], normalised"
