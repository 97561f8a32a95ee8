"""Real engines of real graphs, built without a GPU; what they hold is compared with the layout."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core.engines.conftest import L4, plan_of

from vpdeploy.engines import building, progress
from vpdeploy.engines.building import BuildRequest, build_engine, explain_failure
from vpdeploy.engines.plan import EngineOptions
from vpdeploy.engines.profile import AxisRange, Profile
from vpdeploy.engines.store import list_engines, verify_engine
from vpdeploy.engines.toolkit import Toolkit
from vpdeploy.errors import BuildError, SpecError
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.bundle import Bundle
from vpdeploy.format.graphfacts import Precision

TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120")
TASKS = {"prefix": ("e2vpt", "vpt-deep"), "adaptive": ("vapt",), "superset": ("e2vpt", "vapt", "linear")}
OPTIONS = {"prompt_tokens": 5, "kv_tokens": 3, "hidden": 4}


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, shared_traces: Path) -> dict[str, Path]:
    """Runs of every method that can be switched, all with random prompts."""
    import tiny_runs

    folder = tmp_path_factory.mktemp("engine-runs")
    weights = tiny_runs.write_weights(folder / "vit.safetensors")
    backbone = tiny_runs.backbone_of(weights)
    for seed, name in enumerate(("e2vpt", "vpt-deep", "vapt", "linear")):
        method = tiny_runs.random_method(backbone.vit, name, seed=seed, **OPTIONS)
        model = tiny_runs.prompted(backbone.vit, method, 3 + seed, seed=seed)
        tiny_runs.write_model(folder / name, model, backbone, name=name, method=name, weights=weights)
    return {name: folder / name for name in ("e2vpt", "vpt-deep", "vapt", "linear")}


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, runs: dict[str, Path]) -> Callable[..., Artifact]:
    """Bundles by family and precision, and the folded ``e2vpt``; each exported once, and changed by no test."""
    from exports import export_bundle, export_folded

    made: dict[tuple[str, str, int], Artifact] = {}

    def export(kind: str, precision: Precision = "fp16", opset: int = 20) -> Artifact:
        key = (kind, precision, opset)
        if key not in made:
            out = tmp_path_factory.mktemp("engine-graphs")
            if kind == "folded":
                export_folded(runs["e2vpt"], out / "task.onnx", precision=precision, opset=opset)
                made[key] = Artifact.open(out / "task.onnx")
            else:
                export_bundle([runs[task] for task in TASKS[kind]], out / "zoo", precision=precision, opset=opset)
                made[key] = Artifact.open(out / "zoo")
        return made[key]

    return export


def ahead(*targets: str, **changes: Any) -> BuildRequest:
    return BuildRequest(runtime="tensorrt-rtx", targets=targets, **changes)


@pytest.fixture
def configurations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configurations that reached NVIDIA's builder, in the order of the builds."""
    seen: list[Any] = []
    real = building.configure

    def spy(toolkit: Toolkit, builder: Any, config: Any, plan: Any, interface: Any) -> None:
        real(toolkit, builder, config, plan, interface)
        seen.append(config)

    monkeypatch.setattr(building, "configure", spy)
    return seen


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("superset", TARGETS),  # has all that the other bundles have
        *((kind, ("sm_75", "sm_120")) for kind in ("prefix", "adaptive", "folded")),
        *(pytest.param(kind, TARGETS[1:4], marks=pytest.mark.slow) for kind in ("prefix", "adaptive", "folded")),
    ],
)
def test_engines_are_built_for_every_target_without_a_gpu(exported, kind, targets, rtx: Toolkit, configurations):
    artifact = exported(kind)
    for target in targets:
        result = build_engine(artifact, ahead(target))
        assert result.built
        verify_engine(result.engine)
        assert result.engine.card.targets == (target,)
        assert result.engine.path.name.startswith(f"tensorrt-rtx-1.7-{target}-fp16-")
    chosen = [(config.num_compute_capabilities, config.get_compute_capability(0).name) for config in configurations]
    assert chosen == [(1, target.replace("sm_", "SM")) for target in targets]


def onnx_interface(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and outputs as the ONNX file itself declares them."""
    onnx = pytest.importorskip("onnx", reason="needs the export extra")
    graph = onnx.load(path, load_external_data=False).graph

    def describe(values: Any) -> dict[str, Any]:
        return {
            value.name: {
                "dtype": str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)),
                "shape": [each.dim_param or each.dim_value for each in value.type.tensor_type.shape.dim],
            }
            for value in values
        }

    return describe(graph.input), describe(graph.output)


@pytest.mark.parametrize("kind", ["prefix", "adaptive", "superset", "folded"])
def test_the_card_says_what_the_onnx_file_declares(exported, kind: str, rtx: Toolkit):
    artifact = exported(kind)
    card = build_engine(artifact, ahead("sm_89")).engine.card.to_fields()
    inputs, outputs = onnx_interface(artifact.graph_path)
    assert card["inputs"] == inputs
    assert card["outputs"] == outputs
    assert next(iter(card["inputs"])) == "image"


@pytest.mark.parametrize("kind", ["prefix", "superset"])
def test_the_table_of_the_bundle_fits_the_built_network(exported, kind: str, rtx: Toolkit):
    """The network is parsed anew with NVIDIA's parser, and compared with arrays as the session would bind them."""
    from vpdeploy.table import Table

    artifact: Artifact = exported(kind)
    card = build_engine(artifact, ahead("sm_86")).engine.card
    table = Table.of(artifact.read_prompt_sets())
    module = rtx.module
    builder = module.Builder(rtx.logger)
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = module.OnnxParser(network, rtx.logger)
    assert parser.parse_from_file(str(artifact.graph_path))
    dtypes = {"HALF": np.float16, "FLOAT": np.float32, "UINT8": np.uint8, "INT32": np.int32}
    found = {network.get_input(index).name: network.get_input(index) for index in range(network.num_inputs)}
    assert set(found) == {"image", "slot", *table.arrays}
    ranges = {axis: tuple(each) for axis, each in card.profile.ranges.items()}
    for name, array in table.arrays.items():
        assert dtypes[found[name].dtype.name] == array.dtype
        assert len(found[name].shape) == array.ndim
        for axis, size in enumerate(found[name].shape):
            if size == -1:
                least, _, most = ranges[found[name].get_dimension_name(axis)]
                assert least <= array.shape[axis] <= most
            else:
                assert size == array.shape[axis]
    assert (tuple(found["image"].shape), found["image"].dtype.name) == ((-1, 32, 32, 3), "UINT8")
    assert (tuple(found["slot"].shape), found["slot"].dtype.name) == ((-1,), "INT32")
    output = network.get_output(0)
    assert (output.name, output.dtype.name, tuple(output.shape)) == ("logits", "FLOAT", (-1, -1))


def test_the_profile_that_the_builder_got_is_the_one_on_the_card(exported, rtx: Toolkit, monkeypatch):
    given: dict[str, Any] = {}
    real = Profile.shapes_of

    def spy(profile: Profile, binding: Any) -> Any:
        shapes = real(profile, binding)
        given[str(binding.shape)] = shapes
        return shapes

    monkeypatch.setattr(Profile, "shapes_of", spy)
    ranges = {"batch": (1, 2, 4), "slots": (1, 5, 50), "prefix": (8, 8, 24), "classes": (2, 5, 9)}
    asked = Profile(ranges={axis: AxisRange(*sizes) for axis, sizes in ranges.items()})
    card = build_engine(exported("prefix"), ahead("sm_80", profile=asked)).engine.card
    assert card.profile == asked
    assert given["('slots', 3, 3, 'prefix', 16)"] == ((1, 3, 3, 8, 16), (5, 3, 3, 8, 16), (50, 3, 3, 24, 16))
    assert given["('slots', 48, 'classes')"] == ((1, 48, 2), (5, 48, 5), (50, 48, 9))
    assert given["('batch', 32, 32, 3)"] == ((1, 32, 32, 3), (2, 32, 32, 3), (4, 32, 32, 3))


def test_one_engine_serves_several_targets(exported, rtx: Toolkit, configurations):
    card = build_engine(exported("prefix"), ahead("sm_86", "sm_89", "sm_120")).engine.card
    (config,) = configurations
    assert card.targets == ("sm_86", "sm_89", "sm_120")
    names = [config.get_compute_capability(index).name for index in range(config.num_compute_capabilities)]
    assert names == ["SM86", "SM89", "SM120"]


def test_the_same_engine_is_not_built_twice_unless_forced_or_damaged(exported, rtx: Toolkit):
    artifact, request = exported("prefix"), ahead("sm_86", profile=Profile().add("batch", AxisRange(1, 1, 7)))
    first = build_engine(artifact, request)
    assert first.built
    assert not build_engine(artifact, request).built
    forced = build_engine(artifact, ahead("sm_86", profile=Profile().add("batch", AxisRange(1, 1, 7)), force=True))
    assert forced.built
    assert forced.repaired is None
    first.engine.path.write_bytes(b"truncated")
    again = build_engine(artifact, request)
    assert again.built
    assert "truncated, 9 of" in str(again.repaired)
    verify_engine(again.engine)


def test_a_task_more_does_not_ask_for_another_engine(exported, runs: dict[str, Path], rtx: Toolkit, tmp_path: Path):
    import shutil

    from exports import add_to_bundle

    zoo = Path(shutil.copytree(exported("superset").path, tmp_path / "zoo"))
    shutil.rmtree(zoo / "engines", ignore_errors=True)
    assert build_engine(Artifact.open(zoo), ahead("sm_89")).built
    add_to_bundle(zoo, runs["vpt-deep"])
    assert len(Bundle.open(zoo).tasks) == 4
    assert not build_engine(Artifact.open(zoo), ahead("sm_89")).built


@pytest.mark.parametrize(
    ("precision", "opset", "targets", "remedy"),
    [
        (
            "fp32",
            20,
            ("sm_75", "sm_86"),
            r"sm_75 has no float32 matrix products there; export with --fp16, or leave out",
        ),
        ("bf16", 20, ("sm_75",), "sm_75 has no bfloat16; export with --fp16, or leave out sm_75"),
        ("fp32", 23, ("sm_86",), "no kernel for an Attention operator of .*; export with --fp16 or --opset 20"),
        ("fp16", 23, ("sm_86",), "no kernel for an Attention operator of .*; export with --opset 20"),
    ],
)
def test_what_a_target_cannot_compute_is_said_with_the_way_out(
    exported, rtx: Toolkit, precision, opset, targets, remedy
):
    artifact = exported("folded", precision, opset)
    with pytest.raises(BuildError, match=remedy) as caught:
        build_engine(artifact, ahead(*targets))
    assert "\n" not in str(caught.value)
    assert list_engines(artifact) == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_precisions_are_built_for_gpus_that_have_them(exported, rtx: Toolkit, precision):
    artifact = exported("folded", precision)
    assert build_engine(artifact, ahead("sm_80", "sm_120")).engine.card.precision == precision


def test_too_small_a_workspace_is_said_with_the_option(exported, rtx: Toolkit):
    with pytest.raises(BuildError, match=r"out of memory .*; raise --workspace-mb"):
        build_engine(exported("folded"), ahead("sm_86", options=EngineOptions(workspace_bytes=1024)))


def test_weights_are_not_stripped_without_a_gpu(exported, rtx: Toolkit):
    with pytest.raises(BuildError, match=r"--weight-stripped: TensorRT-RTX needs a GPU for it, and here is none"):
        build_engine(exported("folded"), ahead("sm_86", options=EngineOptions(weight_stripped=True)))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (EngineOptions(version_compatible=True), "--version-compatible: TensorRT-RTX has no such engines"),
        (
            EngineOptions(hardware="ampere+"),
            "--hardware: TensorRT-RTX has no such levels; name every GPU with --target",
        ),
        (EngineOptions(hardware="any"), "choose one of: none, same-sm, ampere"),
    ],
)
def test_what_the_runtime_has_not_is_refused_before_anything_is_built(exported, rtx: Toolkit, options, complaint):
    with pytest.raises(SpecError, match=complaint):
        build_engine(exported("folded"), ahead("sm_86", options=options))


def test_an_operator_that_nvidia_has_not_is_named_with_its_node(rtx: Toolkit, exported, tmp_path: Path):
    onnx = pytest.importorskip("onnx", reason="needs the export extra")
    path = tmp_path / "task.onnx"
    model = onnx.load(exported("folded").path)
    model.graph.node[3].op_type, model.graph.node[3].domain, model.graph.node[3].name = "Foo", "com.acme", "my_node"
    model.opset_import.append(onnx.helper.make_opsetid("com.acme", 1))
    onnx.save(model, path)
    with pytest.raises(BuildError, match="cannot read the graph: operator Foo of node 'my_node' is not supported"):
        build_engine(Artifact.open(path), ahead("sm_86"))
    assert not (tmp_path / "engines").exists()


def test_a_graph_that_is_not_what_its_metadata_say_is_refused(rtx: Toolkit, exported, tmp_path: Path):
    onnx = pytest.importorskip("onnx", reason="needs the export extra")
    model = onnx.load(exported("folded").path)
    model.graph.output[0].name = model.graph.node[-1].output[0] = "scores"
    onnx.save(model, tmp_path / "task.onnx")
    with pytest.raises(BuildError, match=r"expected the outputs \['logits'\], found \['scores'\]; export again"):
        build_engine(Artifact.open(tmp_path / "task.onnx"), ahead("sm_86"))


def test_a_graph_replaced_during_the_build_gives_no_engine(rtx: Toolkit, exported, tmp_path: Path):
    path = tmp_path / "task.onnx"
    data = exported("folded").path.read_bytes()
    path.write_bytes(data)

    def export_again(share: float, title: str) -> None:
        path.write_bytes(data + b"\x22\x00")  # an empty domain: another file of the same meaning

    with pytest.raises(BuildError, match="was replaced while the engine was being built; run the command again"):
        build_engine(Artifact.open(path), ahead("sm_86"), on_progress=export_again)
    assert not (tmp_path / "engines").exists()


def test_cancelling_ends_the_build_and_leaves_nothing(exported, rtx: Toolkit):
    artifact = exported("adaptive")
    before = list_engines(artifact)

    def press_ctrl_c(share: float, title: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(artifact, ahead("sm_121"), on_progress=press_ctrl_c)
    assert list_engines(artifact) == before


def test_progress_never_falls_and_ends_at_one(exported, rtx: Toolkit, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "_POLL_SECONDS", 0.001)
    shares: list[float] = []
    build_engine(exported("prefix"), ahead("sm_121"), on_progress=lambda share, _: shares.append(share))
    assert shares == sorted(shares)
    assert shares[0] >= 0
    assert shares[-1] == 1


def test_what_is_wrong_with_the_gpus_is_said(exported, rtx: Toolkit, machine):
    machine(None)
    with pytest.raises(BuildError, match=r"name the GPUs with --target: sm_75, sm_80, sm_86, sm_89, sm_120, sm_121"):
        build_engine(exported("folded"), BuildRequest(runtime="tensorrt-rtx"))
    with pytest.raises(BuildError, match=r"has no target sm_87 \(Jetson Orin\); it has: sm_75"):
        build_engine(exported("folded"), ahead("sm_87"))
    machine(L4)
    assert build_engine(exported("folded"), BuildRequest(runtime="tensorrt-rtx")).engine.card.targets == ("sm_89",)


def test_the_sidecar_is_a_document_of_its_own(exported, rtx: Toolkit):
    artifact = exported("superset")
    engine = build_engine(artifact, ahead("sm_89")).engine
    fields = json.loads(engine.path.with_name(f"{engine.card.key}.json").read_text())
    assert fields["layout_digest"] == artifact.layout.digest
    assert fields["size_bytes"] == engine.path.stat().st_size
    assert re.fullmatch("[0-9a-f]{64}", fields["sha256"])
    assert fields["build_seconds"] > 0


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (
            "[cudaResources.cpp::x::25] Error Code 1: Cuda Runtime (In x at /_src/a.cpp:25 (cudaError 35: CUDA driver "
            "version is insufficient)); IBuilder::buildSerializedNetwork: Error Code 9: Something new In compileGraph "
            "at /_src/optimizer/myelin/codeGenerator.cpp:2012)",
            "for sm_86, sm_89: Error Code 9: Something new",
        ),
        ("", "for sm_86, sm_89: it gave no reason"),
        (
            "MyelinCheckException: graph_jit.cpp:278: CHECK(status == CUDA_SUCCESS) failed.",
            "this needs a GPU and its driver",
        ),
        ("[a.cpp::b::132] Error Code 2: OutOfMemory (Requested size was 171355648 bytes.)", "lower MAX of --batch"),
    ],
)
def test_the_log_of_a_failed_build_becomes_one_line(toy_artifact: Artifact, log: str, expected: str):
    text = explain_failure(log, plan_of(toy_artifact))
    assert text.startswith("TensorRT-RTX 1.7.1.116 cannot build a fp32 engine for sm_86, sm_89: ")
    assert expected in text
    assert "/_src/" not in text


@pytest.mark.parametrize(
    ("precision", "advice"),
    [
        ("fp32", "sm_75 has no float32 matrix products there; export with --fp16, or leave out sm_75"),
        ("fp16", "parts of the graph are float32 .vpdeploy inspect names them., which sm_75 cannot; leave out sm_75"),
    ],
)
def test_float32_on_turing_names_what_can_be_done_about_it(toy_artifact: Artifact, precision: str, advice: str):
    log = "Cannot compile operation 'x' for Turing (SM75): FP32 GEMM is not supported."
    assert re.search(advice, explain_failure(log, plan_of(toy_artifact, precision=precision)))


def test_a_long_log_is_cut(toy_artifact: Artifact):
    assert len(explain_failure("word " * 1000, plan_of(toy_artifact))) < 800
