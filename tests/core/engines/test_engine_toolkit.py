from __future__ import annotations

import sys
from pathlib import Path

import pytest
from core.engines.conftest import L4
from core.engines.stand_in import stand_in_module

from vpdeploy.engines import toolkit
from vpdeploy.engines.toolkit import Toolkit, choose_runtime, is_installed, load_toolkit, version_numbers
from vpdeploy.errors import BuildError, MissingExtraError, SpecError


def test_a_version_before_strong_typing_is_refused(rtx: Toolkit, monkeypatch: pytest.MonkeyPatch):
    old = stand_in_module(rtx.module)
    old.__version__ = "8.6.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    monkeypatch.setattr(toolkit, "is_installed", lambda name: True)
    toolkit._load.cache_clear()
    with pytest.raises(BuildError, match=r"TensorRT 8.6.1 is too old, 10.0 or newer"):
        load_toolkit("tensorrt")


def test_stubs_alone_are_not_taken_for_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "__init__.pyi").write_text("class Builder: ...")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    toolkit._load.cache_clear()
    assert not is_installed("tensorrt")
    with pytest.raises(MissingExtraError, match=r"'tensorrt' is not installed: pip install 'vpdeploy\[tensorrt\]'"):
        load_toolkit("tensorrt")


def test_a_toolkit_whose_libraries_are_broken_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "__init__.py").write_text("raise OSError('libnvinfer.so.10: cannot open shared object')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    toolkit._load.cache_clear()
    with pytest.raises(BuildError, match=r"installed but cannot be loaded: libnvinfer.so.10.*reinstall it"):
        load_toolkit("tensorrt")


def test_an_interrupt_while_a_toolkit_loads_is_no_broken_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As pybind11 reports it: the interrupt becomes the cause of an ImportError."""
    (tmp_path / "tensorrt").mkdir()
    source = "try:\n    raise KeyboardInterrupt\nexcept BaseException as e:\n    raise ImportError('failed') from e\n"
    (tmp_path / "tensorrt" / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    toolkit._load.cache_clear()
    with pytest.raises(KeyboardInterrupt):
        load_toolkit("tensorrt")


def test_an_unknown_runtime_is_refused_with_the_known_ones():
    with pytest.raises(SpecError, match="unknown runtime 'openvino'; engines are built for: tensorrt, tensorrt-rtx"):
        load_toolkit("openvino")


def test_errors_are_kept_until_they_are_taken(rtx: Toolkit):
    rtx.take_errors()
    severity = rtx.module.ILogger.Severity
    rtx.logger.log(severity.ERROR, "one\nline")
    rtx.logger.log(severity.WARNING, "not an error")
    rtx.logger.log(severity.INTERNAL_ERROR, "two")
    rtx.logger.log(severity.ERROR, "two")
    assert rtx.take_errors() == "one line; two"
    assert rtx.take_errors() == ""


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("10.13.0.35", (10, 13, 0, 35)), ("11.4.1", (11, 4, 1)), ("8.6.1.post1", (8, 6, 1)), ("", ())],
)
def test_the_numbers_of_a_version(version: str, numbers: tuple[int, ...]):
    assert version_numbers(version) == numbers


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
