"""The calls that are made on TensorRT, held against the API of the versions that cannot be installed here."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from core.engines.conftest import L4
from core.engines.stand_in import API, CLASSES, REMOVED_IN_11, stand_in_module

import vpdeploy.engines
from vpdeploy.engines import building, toolkit
from vpdeploy.engines.building import BuildRequest, build_engine
from vpdeploy.engines.plan import EngineOptions
from vpdeploy.engines.toolkit import Toolkit, host_platform, load_toolkit
from vpdeploy.errors import BuildError, SpecError
from vpdeploy.format.artifact import Artifact

SOURCES = sorted(Path(vpdeploy.engines.__path__[0]).glob("*.py"))
RTX_ONLY = {"ComputeCapability"}


def module_members(source: Path) -> Iterator[tuple[str, ...]]:
    """Yield every dotted path that a source takes from a variable ``module``, e.g. ("BuilderFlag", "STRIP_PLAN")."""
    tree = ast.parse(source.read_text())
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            path: list[str] = []
            at: ast.expr = node
            while isinstance(at, ast.Attribute):
                path.insert(0, at.attr)
                at = at.value
            root = at.id if isinstance(at, ast.Name) else ""
            if root == "module" or "module" in path[:-1]:
                yield tuple(path[path.index("module") + 1 :] if "module" in path else path)


def test_every_member_named_in_the_sources_exists_in_10_13_and_in_what_11_keeps():
    named = {path for source in SOURCES for path in module_members(source) if not path[0].startswith("__")}
    assert {("Builder",), ("OnnxParser",), ("BuilderFlag", "STRIP_PLAN")} <= named, "the search finds what is there"
    for path in named:
        if path[0] in RTX_ONLY:
            continue
        assert path[0] in CLASSES, f"TensorRT {API['version']} has no {path[0]}"
        if len(path) > 1 and not path[1].startswith("__"):
            assert path[1] in CLASSES[path[0]], f"TensorRT {API['version']} has no {'.'.join(path)}"
            assert ".".join(path[:2]) not in REMOVED_IN_11


def test_every_member_named_in_the_sources_exists_in_tensorrt_rtx(rtx: Toolkit):
    for source in SOURCES:
        for path in module_members(source):
            at: Any = rtx.module
            for name in path:
                assert hasattr(at, name), f"{source.name}: TensorRT-RTX {rtx.version} has no {'.'.join(path)}"
                at = getattr(at, name)


@pytest.fixture
def tensorrt(rtx: Toolkit, monkeypatch: pytest.MonkeyPatch, machine, tmp_path: Path) -> Iterator[Toolkit]:
    """TensorRT 10.13 as far as its API goes, on an L4 that is not there."""
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in_module(rtx.module))
    monkeypatch.setattr(toolkit, "is_installed", lambda name: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    machine(L4)
    toolkit._load.cache_clear()
    yield load_toolkit("tensorrt")
    toolkit._load.cache_clear()


# TensorRT-RTX has these calls and says that they do nothing there.
@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX 1.2.:DeprecationWarning")
def test_the_shared_path_builds_through_the_api_of_tensorrt(tensorrt: Toolkit, folded_copy: Artifact, tmp_path):
    request = BuildRequest(runtime="tensorrt", options=EngineOptions(workspace_bytes=2**30, hardware="same-sm"))
    result = build_engine(folded_copy, request)
    card = result.engine.card
    assert result.built
    assert card.key.startswith("tensorrt-10.13-sm_89-fp32-")
    assert (card.runtime, card.runtime_version, card.targets) == ("tensorrt", "10.13.0.35", ("sm_89",))
    assert card.platform == host_platform()
    assert card.gpu_name is None
    caches = [path.name for path in (tmp_path / "cache" / "vpdeploy" / "timing").iterdir()]
    name = "tensorrt-10.13.0.35-sm_89-NVIDIA-L4.cache"
    assert sorted(caches) == [name, f"{name}.lock"]


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX 1.2.:DeprecationWarning")
def test_an_engine_tuned_on_a_gpu_says_on_which(tensorrt: Toolkit, folded_copy: Artifact, machine):
    card = build_engine(folded_copy, BuildRequest(runtime="tensorrt", targets=("sm_89",))).engine.card
    assert card.gpu_name == "NVIDIA L4"
    assert not build_engine(folded_copy, BuildRequest(runtime="tensorrt")).built


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX 1.2.:DeprecationWarning")
@pytest.mark.parametrize(
    ("options", "flags"),
    [
        (EngineOptions(), set()),
        (EngineOptions(version_compatible=True), {"VERSION_COMPATIBLE"}),
        (EngineOptions(weight_stripped=True), {"STRIP_PLAN", "REFIT_IDENTICAL"}),
    ],
)
def test_the_options_of_tensorrt_become_its_flags(
    tensorrt: Toolkit, folded_copy: Artifact, rtx: Toolkit, monkeypatch: pytest.MonkeyPatch, options, flags
):
    """The build itself is left out: the library behind the stand-in does not know these variants without a GPU."""
    seen: list[Any] = []

    def stop(module: Any, progress: Any) -> None:
        raise KeyboardInterrupt

    real = building.configure

    def spy(toolkit: Toolkit, builder: Any, config: Any, plan: Any, interface: Any) -> None:
        plain = config.flags
        real(toolkit, builder, config, plan, interface)
        seen.append(config.flags & ~plain)

    monkeypatch.setattr(building, "configure", spy)
    monkeypatch.setattr(building, "monitor_of", stop)
    with pytest.raises(KeyboardInterrupt):
        build_engine(folded_copy, BuildRequest(runtime="tensorrt", options=options))
    known = rtx.module.BuilderFlag.__members__
    assert seen == [sum(1 << int(known[name]) for name in flags)]


def test_tensorrt_builds_for_the_gpu_that_is_here_alone(tensorrt: Toolkit, folded_copy: Artifact, machine):
    with pytest.raises(
        BuildError, match=r"--target sm_86: TensorRT builds for the GPU that is here, NVIDIA L4 \(sm_89\)"
    ):
        build_engine(folded_copy, BuildRequest(runtime="tensorrt", targets=("sm_86",)))
    machine(None)
    with pytest.raises(BuildError, match=r"on the GPU that will run them, and here is none \(no NVIDIA driver\)"):
        build_engine(folded_copy, BuildRequest(runtime="tensorrt"))


def test_ampere_engines_are_built_on_ampere(tensorrt: Toolkit, folded_copy: Artifact, machine):
    from vpdeploy.machine import Gpu

    machine(Gpu(name="Tesla T4", sm="sm_75", memory_bytes=1, cuda_version="13.0"))
    with pytest.raises(SpecError, match=r"has to be built on Ampere or newer, here is Tesla T4"):
        build_engine(folded_copy, BuildRequest(runtime="tensorrt", options=EngineOptions(hardware="ampere+")))


@pytest.fixture
def folded_copy(folded_flowers: Path, tmp_path: Path) -> Artifact:
    path = tmp_path / "flowers.onnx"
    path.write_bytes(folded_flowers.read_bytes())
    return Artifact.open(path)


def test_the_stand_in_refuses_what_tensorrt_has_not(rtx: Toolkit):
    module: ModuleType = stand_in_module(rtx.module)
    builder = module.Builder(rtx.logger)
    config = builder.create_builder_config()
    with pytest.raises(AssertionError, match=r"has no IBuilderConfig\.num_compute_capabilities"):
        config.num_compute_capabilities = 1
    with pytest.raises(AssertionError, match=r"has no IBuilderConfig\.set_compute_capability"):
        config.set_compute_capability(1, 0)
    with pytest.raises(AssertionError, match=r"add_optimization_profile takes .* not 2 arguments"):
        config.add_optimization_profile(1, 2)
    with pytest.raises(AssertionError, match=r"11 has no BuilderFlag\.FP16"):
        _ = module.BuilderFlag.FP16
