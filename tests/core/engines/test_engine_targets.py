from __future__ import annotations

import re

import pytest
from core.engines.conftest import L4, plan_of

from vpdeploy.artifact import Artifact
from vpdeploy.engines import toolkit
from vpdeploy.engines.building import explain_failure
from vpdeploy.engines.target import choose_targets, parse_targets, supported_targets
from vpdeploy.engines.toolkit import Toolkit, choose_runtime
from vpdeploy.errors import MissingExtraError, SpecError


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("sm_86", ("sm_86",)),
        ("sm_120,sm_75, sm_86", ("sm_75", "sm_86", "sm_120")),
        ("86,SM89,8.0,12.0,sm86", ("sm_80", "sm_86", "sm_89", "sm_120")),
    ],
)
def test_targets_are_read_in_the_spellings_in_use(text: str, targets: tuple[str, ...]):
    assert parse_targets(text) == targets


@pytest.mark.parametrize("text", ["", "ampere", "sm_86;sm_89", "sm_", "8", "8.66", "sm_1234", "sm_86,"])
def test_what_is_no_target_is_refused(text: str):
    with pytest.raises(SpecError, match="is no GPU architecture; write"):
        parse_targets(text)


def test_tensorrt_rtx_has_the_targets_that_the_documentation_lists(rtx: Toolkit):
    assert {"sm_75", "sm_80", "sm_86", "sm_89", "sm_120"} <= set(supported_targets(rtx))


def test_this_machines_gpu_is_the_default(rtx: Toolkit):
    assert choose_targets(rtx, None, L4) == ("sm_89",)
    assert choose_targets(rtx, ("sm_86",), L4) == ("sm_86",)


@pytest.mark.parametrize(
    ("installed", "targets", "gpu", "expected"),
    [
        (("tensorrt-rtx",), None, None, ("tensorrt-rtx", "the only one installed")),
        (("tensorrt",), ("sm_86",), None, ("tensorrt", "the only one installed")),
        (("tensorrt", "tensorrt-rtx"), None, None, ("tensorrt-rtx", "no GPU is here, and it needs none")),
        (("tensorrt", "tensorrt-rtx"), None, L4, ("tensorrt", "it times its kernels on this GPU, NVIDIA L4")),
        (("tensorrt", "tensorrt-rtx"), ("sm_89",), L4, ("tensorrt", "it times its kernels on this GPU, NVIDIA L4")),
        (
            ("tensorrt", "tensorrt-rtx"),
            ("sm_86", "sm_89"),
            L4,
            ("tensorrt-rtx", "the other can build for this GPU alone (sm_89)"),
        ),
    ],
)
def test_the_runtime_that_fits_is_chosen_with_the_reason(monkeypatch, installed, targets, gpu, expected):
    monkeypatch.setattr(toolkit, "is_installed", lambda name: name in installed)
    assert choose_runtime(targets, gpu) == expected


def test_without_a_runtime_the_one_from_pypi_is_named(monkeypatch):
    monkeypatch.setattr(toolkit, "is_installed", lambda name: False)
    with pytest.raises(MissingExtraError, match=r"pip install 'vpdeploy\[rtx\]'"):
        choose_runtime(None, None)


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
