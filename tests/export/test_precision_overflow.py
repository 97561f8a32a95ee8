"""Models that overflow float16 in one place: the gate refuses them without islands, and the probe finds the islands."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import overflowing
import pytest
import tiny_runs
import torch
from exports import add_to_bundle, export_bundle, export_folded

from vpdeploy.cli.main import main
from vpdeploy.errors import ParityError
from vpdeploy.format.bundle import Bundle
from vpdeploy.format.folded import FoldedCard
from vpdeploy_export import export
from vpdeploy_export.compilation import compile_prompts
from vpdeploy_export.precision import decision
from vpdeploy_export.precision.bisection import locate
from vpdeploy_export.precision.islands import NO_ISLANDS, Islands
from vpdeploy_train.backbone import load_backbone
from vpdeploy_train.methods.kept import Kept
from vpdeploy_train.methods.method import PromptDimensions
from vpdeploy_train.run import Run

EXPECTED = {
    "mlp": {"blocks.1": ["mlp"]},
    "residual": {
        "blocks.0": ["mlp", "residual"],
        "blocks.1": ["mlp", "residual"],
        "blocks.2": ["mlp", "residual"],
        "final": ["norm"],
    },
    "logits": {"blocks.1": ["attention"]},
}
BROKEN = {"mlp": "block 1, mlp", "residual": "block 1, residual", "logits": "block 1, attention"}


@pytest.fixture(scope="module", params=sorted(overflowing.CASES))
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def run_path(tmp_path_factory: pytest.TempPathFactory, case: str) -> Path:
    return overflowing.write_run(tmp_path_factory.mktemp(case), case)


def without_islands(monkeypatch: pytest.MonkeyPatch) -> None:
    real = decision.probe_graph
    monkeypatch.setattr(
        export, "probe_graph", lambda *args, **options: replace(real(*args, **options), islands=NO_ISLANDS)
    )


def test_float16_without_islands_fails_the_gate_and_names_the_place(
    run_path: Path, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    without_islands(monkeypatch)
    with pytest.raises(ParityError, match="nothing was written; try --bf16, or leave --fp16 out") as refused:
        export_folded(run_path, tmp_path / "task.onnx", precision="fp16")
    assert f"; {BROKEN[case]} (" in str(refused.value)
    assert "is not finite where float32 reaches" in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_needs_no_islands_but_has_few_digits(run_path: Path, case: str, tmp_path: Path):
    if case == "mlp":
        report = export_folded(run_path, tmp_path / "task.onnx", precision="bf16")
        assert report.probe is not None
        assert not report.probe.islands
        assert report.parity[0].runtime == "onnxruntime-cpu, bfloat16 emulated"
        return
    # 1e5 beside ordinary values: bfloat16 steps by 512 there.
    with pytest.raises(ParityError, match="nothing was written; try --fp16, or leave --bf16 out for float32"):
        export_folded(run_path, tmp_path / "task.onnx", precision="bf16")


@pytest.mark.parametrize("form", ["folded", pytest.param("bundle", marks=pytest.mark.slow)])
def test_float16_with_the_probes_islands_passes(run_path: Path, case: str, form: str, tmp_path: Path):
    if form == "folded":
        report = export_folded(run_path, tmp_path / "task.onnx", precision="fp16")
        graph = tmp_path / "task.onnx"
        details = FoldedCard.read(graph).graph.details
    else:
        report = export_bundle([run_path], tmp_path / "zoo", precision="fp16")
        graph = tmp_path / "zoo" / "model.onnx"
        details = Bundle.open(tmp_path / "zoo").manifest.graph.details
    assert report.probe is not None
    assert report.probe.islands.to_fields() == EXPECTED[case]
    assert details["precision"] == report.to_fields()["probe"]
    assert report.to_fields()["precision"] == "fp16"
    assert details["precision"]["float32"] == EXPECTED[case]
    (parity,) = report.parity
    assert parity.passed
    if form == "bundle":
        kept = {spec.dtype for spec in Bundle.open(tmp_path / "zoo").manifest.layout.tensors if "key" in spec.name}
        assert kept == {"float32" if case == "logits" else "float16"}
    assert products_in_float32(graph) == expected_products(case)


def products_in_float32(path: Path) -> set[tuple[int, str]]:
    """Block and part of every float32 product, sum and norm inside the blocks; a softmax always is."""
    found = set()
    for node in ir.load(path).graph:
        if node.op_type in ("MatMul", "Gemm", "Gelu", "Add", "LayerNormalization"):
            location = locate(node, node.outputs[0])
            wide = node.outputs[0].dtype == ir.DataType.FLOAT
            if location.block is not None and wide and not feeds_softmax(node):
                found.add((location.block, str(location.part)))
    return found


def feeds_softmax(node: ir.Node) -> bool:
    """The mask of a bundle is added to float32 logits in every graph."""
    return node.op_type == "Add" and any(
        user.op_type == "Softmax" for value in node.outputs for user in value.consumers()
    )


def expected_products(case: str) -> set[tuple[int, str]]:
    if case == "residual":
        # The norms between wide tokens and narrow attention are wide; of attention nothing else is.
        return {(block, part) for block in range(3) for part in ("attention", "mlp", "residual")}
    return {(1, "mlp" if case == "mlp" else "attention")}


def test_of_attention_only_the_norm_is_wide_where_the_tokens_are(tmp_path: Path):
    run = overflowing.write_run(tmp_path, "residual")
    export_folded(run, tmp_path / "task.onnx", precision="fp16")
    wide = {
        node.op_type
        for node in ir.load(tmp_path / "task.onnx").graph
        if node.outputs[0].dtype == ir.DataType.FLOAT
        and locate(node, node.outputs[0]).part == "attention"
        and locate(node, node.outputs[0]).block is not None
    }
    assert wide <= {"LayerNormalization", "Softmax", "Slice", "ReduceSum", "Cast", "Reshape", "Gather"}


def test_the_command_says_what_stays_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run = overflowing.write_run(tmp_path, "mlp")
    command = ["vpdeploy", "export", str(run), "--out", str(tmp_path / "task.onnx"), "--fp16"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        main()
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "\n  stays float32, or it could overflow: block 1 mlp\n" in out
    (entry,) = onnx.load(tmp_path / "task.onnx").metadata_props
    assert json.loads(entry.value)["graph"]["details"]["precision"]["float32"] == {"blocks.1": ["mlp"]}


def test_a_fused_graph_writes_a_float32_island_in_parts(tmp_path: Path):
    run = overflowing.write_run(tmp_path, "logits")
    export_folded(run, tmp_path / "task.onnx", precision="fp16", opset=23)
    blocks = {
        operator: sorted(
            int(str(node.name).split(".")[1])
            for node in ir.load(tmp_path / "task.onnx").graph
            if node.op_type == operator
        )
        for operator in ("Attention", "Softmax")
    }
    assert blocks == {"Attention": [0, 2], "Softmax": [1]}


def test_both_precisions_at_once_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["vpdeploy", "export", "run", "--out", "x.onnx", "--fp16", "--bf16"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "error: --fp16 and --bf16: a graph has one precision; give one of them\n"


# --- a task that comes later ---


def write_loud_run(folder: Path, weights: Path) -> Path:
    """Write a run whose value prompts fit float16, and what the output projection makes of them does not."""
    backbone = load_backbone(tiny_runs.NAME, weights=weights, image_size=tiny_runs.SIDE)
    kept = Kept.everything(tiny_runs.DEPTH, 0, 30)
    method = tiny_runs.e2vpt(PromptDimensions.of(backbone.trunk), kept, kv_shared=False)
    with torch.no_grad():
        for name, parameter in method.named_parameters():
            if "value" in name:
                parameter.copy_(6e4 * parameter[:, :1].sign().expand_as(parameter))
    model = tiny_runs.prompted(backbone.vit, method, 3, seed=1)
    tiny_runs.write_model(folder / "loud", model, backbone, name="loud", method="e2vpt", weights=weights)
    return folder / "loud"


def test_a_task_beyond_what_was_probed_is_refused_and_fits_a_new_export(
    tiny_run_paths: dict[str, Path], tiny_weights: Path, tmp_path: Path, half_zoo: export.ExportReport
):
    loud = write_loud_run(tmp_path, tiny_weights)
    advice = "nothing was written; the bundle's float16 graph was not probed with this task: export the bundle again"
    before = Bundle.open(half_zoo.path).manifest
    with pytest.raises(ParityError, match=advice):
        add_to_bundle(half_zoo.path, loud)
    assert Bundle.open(half_zoo.path).manifest == before
    report = export_bundle([tiny_run_paths["birds"], loud], tmp_path / "zoo", precision="fp16")
    assert report.probe is not None
    assert report.probe.islands.of(0) >= {"attention"}
    assert set(report.probe.images) == {"birds", "loud"}


# --- the probe itself ---


def test_the_probe_reports_the_trained_models_own_activations(tiny_run_paths: dict[str, Path], tmp_path: Path):
    """Compared with timm's own blocks, run without prompts."""
    run = Run.read(tiny_run_paths["probe"])
    backbone = run.load_backbone()
    report = export_folded(tiny_run_paths["probe"], tmp_path / "task.onnx", precision="fp16").probe
    assert report is not None
    from vpdeploy_export.images import gate_images
    from vpdeploy_train.prompted import normalise_pixels

    settings = run.card.preprocessing
    pixels = torch.from_numpy(gate_images(run, None).pixels)
    seen: dict[str, float] = {}

    def note(name: str):
        def hook(_module: object, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            seen[name] = float(output.abs().max())
            seen[f"{name} input"] = float(inputs[0].abs().max())

        return hook

    for index, block in enumerate(backbone.vit.blocks):
        for name in ("attn.proj", "mlp.fc1", "mlp.act", "mlp.fc2", "norm2"):
            block.get_submodule(name).register_forward_hook(note(f"{index} {name}"))
        block.register_forward_hook(note(f"{index} block"))
    with torch.no_grad():
        backbone.vit(normalise_pixels(pixels, torch.tensor(settings.mean), torch.tensor(settings.std)))
    # The last block computes the class token's row alone.
    for index in range(tiny_runs.DEPTH - 1):
        found = report.maxima.of(index)
        assert found["mixed"] == pytest.approx(seen[f"{index} attn.proj input"], rel=1e-4)
        assert found["projection"] == pytest.approx(seen[f"{index} attn.proj"], rel=1e-4)
        assert found["mlp.fc1"] == pytest.approx(seen[f"{index} mlp.fc1"], rel=1e-4)
        assert found["mlp.act"] == pytest.approx(seen[f"{index} mlp.act"], rel=1e-4)
        assert found["mlp.fc2"] == pytest.approx(seen[f"{index} mlp.fc2"], rel=1e-4)
        tokens = max(seen[f"{index} block"], seen[f"{index} block input"], seen[f"{index} norm2 input"])
        assert found["tokens"] == pytest.approx(tokens, rel=1e-4)
        # max |q kᵀ|/√d is at most the product of the largest norms; and no less than any entry that was found.
        bound = np.sqrt(tiny_runs.WIDTH / tiny_runs.HEADS) ** 2 * found["query"] * found["key"]
        assert 0 < found["logits"] <= bound
    assert report.maxima.found["embedding"]["output"] == pytest.approx(seen["0 block input"], rel=1e-4)


def test_generators_are_probed(tmp_path: Path, tiny_weights: Path):
    backbone = tiny_runs.backbone_of(tiny_weights)
    model = tiny_runs.prompted(
        backbone.vit, tiny_runs.random_method(backbone.vit, "vapt", prompt_tokens=3, hidden=2), 4
    )
    tiny_runs.write_model(tmp_path / "run", model, backbone, name="a", method="vapt", weights=tiny_weights)
    assert compile_prompts(model).adapts
    folded = export_folded(tmp_path / "run", tmp_path / "task.onnx", precision="fp16").probe
    shared = export_bundle([tmp_path / "run"], tmp_path / "zoo", precision="fp16").probe
    assert folded is not None
    assert shared is not None
    for name in ("generated", "generator_hidden"):
        assert name not in folded.maxima.of(0)
        assert folded.maxima.of(1)[name] > 0
        # A bundle's table is float16.
        assert shared.maxima.of(1)[name] == pytest.approx(folded.maxima.of(1)[name], rel=1e-2)


def test_a_float32_graph_is_not_probed(tiny_run_paths: dict[str, Path], folded_flowers: Path, zoo: Path):
    assert FoldedCard.read(folded_flowers).graph.details.get("precision") is None
    assert "precision" not in Bundle.open(zoo).manifest.graph.details


def test_islands_of_no_effect_leave_the_graph_float16(half_zoo: export.ExportReport):
    assert half_zoo.probe is not None
    assert half_zoo.probe.islands == Islands()
    assert products_in_float32(half_zoo.path / "model.onnx") == set()
    assert export.NO_ISLANDS is NO_ISLANDS
