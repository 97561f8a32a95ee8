"""TensorRT and TensorRT-RTX as one API, and everything in which they differ.

The differences, each with where it is documented (docs.nvidia.com/deeplearning/tensorrt and tensorrt-rtx):

* Typing. From TensorRT 10.12 weak typing is deprecated and ``STRONGLY_TYPED`` asks for the other; in 11.x every network
  is strongly typed and the flag is accepted and ignored (11.0, "Migrating from TensorRT 10.x to 11.x"). TensorRT-RTX
  knows strong typing only. So the flag is always given.
* Targets. TensorRT-RTX compiles ahead of time for named compute capabilities and needs no GPU (1.7, "CPU-Only AOT and
  TensorRT-RTX Engines"). TensorRT times kernels on the GPU that is here; other GPUs only by a hardware compatibility
  level: Ampere and newer, or the same compute capability (11.1, "Engine Compatibility").
* Versions. A TensorRT-RTX engine loads in the release that built it alone (1.7, "Engine Compatibility"). A TensorRT
  engine too, unless it was built version-compatible: then in later releases of its major version, and one of 10.x in
  11.x (11.4, "Support Matrix", engine portability).
* Platforms. TensorRT engines are bound to operating system and processor (the same page); TensorRT-RTX's are not.
* Weights apart. TensorRT strips them with ``STRIP_PLAN`` and ``REFIT_IDENTICAL``: 11.3, "Refitting an Engine", warns
  that ``REFIT`` may compute wrongly. TensorRT-RTX strips them with ``STRIP_PLAN`` and ``REFIT`` (1.7, "Refitting
  Engines"), and, tried with 1.7.1, not without a GPU.
* Timing cache. TensorRT takes one (``IBuilderConfig.set_timing_cache``); TensorRT-RTX times nothing while it builds.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import platform
import sys
import threading
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from vpdeploy.errors import BuildError, MissingExtraError, SpecError

if TYPE_CHECKING:  # every start of the command line reads this file
    from vpdeploy.machine import Gpu

_log = logging.getLogger("vpdeploy.engines")


@dataclass(frozen=True, kw_only=True)
class ToolkitSpec:
    """What differs between the runtimes.

    Attributes:
        module: The name that it is imported by.
        extra: The extra of vpdeploy that installs it.
        title: The name that NVIDIA gives it.
        ahead_of_time: Whether it compiles for GPUs that are not here.
        times_kernels: Whether it chooses kernels by timing them on this GPU, so that a timing cache pays.
        version_compatible: Whether it can build engines that later versions load.
        hardware_compatible: Whether it has levels of compatibility with other GPUs.
        refit_flag: The ``BuilderFlag`` that goes with ``STRIP_PLAN``.
        portable: Whether its engines load on every operating system and processor that it runs on.
    """

    module: str
    extra: str
    title: str
    ahead_of_time: bool
    times_kernels: bool
    version_compatible: bool
    hardware_compatible: bool
    refit_flag: str
    portable: bool


TOOLKITS: dict[str, ToolkitSpec] = {
    "tensorrt": ToolkitSpec(
        module="tensorrt",
        extra="tensorrt",
        title="TensorRT",
        ahead_of_time=False,
        times_kernels=True,
        version_compatible=True,
        hardware_compatible=True,
        refit_flag="REFIT_IDENTICAL",
        portable=False,
    ),
    "tensorrt-rtx": ToolkitSpec(
        module="tensorrt_rtx",
        extra="rtx",
        title="TensorRT-RTX",
        ahead_of_time=True,
        times_kernels=False,
        version_compatible=False,
        hardware_compatible=False,
        refit_flag="REFIT",
        portable=True,
    ),
}
"""The runtimes that engines are built for, by the name that ``--runtime`` takes."""

OLDEST_TENSORRT = (10, 0)
"""The first version with strongly typed networks and progress monitors; JetPack 6 stays at 10.3."""


_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
}
"""NumPy's names by those of ``DataType``."""


class Toolkit:
    """One TensorRT-like module, loaded.

    There is one for each module and process: TensorRT registers the first logger it is given for all its objects.

    Args:
        name: A key of ``TOOLKITS``.
        module: The imported module; it has no type, since either may be missing.

    Attributes:
        version: The module's version, all of its numbers, e.g. ``1.7.1.116``.
        logger: An ``ILogger`` of the module that keeps errors for ``take_errors``; shared by all objects.
    """

    def __init__(self, name: str, module: Any) -> None:
        self.name = name
        self.spec = TOOLKITS[name]
        self.module = module
        self.version = str(module.__version__)
        self._errors: list[str] = []
        self._lock = threading.Lock()
        self.logger = _logger_of(module, self._keep)

    def take_errors(self) -> str:
        """Return the errors logged since the last call as one line, and forget them; empty if there are none."""
        with self._lock:
            errors, self._errors = self._errors, []
        return "; ".join(dict.fromkeys(" ".join(error.split()) for error in errors))

    def _keep(self, message: str) -> None:
        with self._lock:
            self._errors.append(message)


def load_toolkit(name: str) -> Toolkit:
    """Import a runtime's module; the same object on every call.

    Args:
        name: A key of ``TOOLKITS``.

    Raises:
        SpecError: There is no runtime of that name.
        MissingExtraError: The module is not installed.
        BuildError: It is installed and cannot be loaded, or is too old.
    """
    if name not in TOOLKITS:
        raise SpecError(f"unknown runtime '{name}'; engines are built for: {', '.join(TOOLKITS)}")
    return _load(name)


def is_installed(name: str) -> bool:
    """Tell whether a runtime's module can be imported, without importing it."""
    try:
        spec = importlib.util.find_spec(TOOLKITS[name].module)
    except (ImportError, ValueError):
        return False
    # A folder without __init__.py, as stub packages leave one, is a namespace and has no origin.
    return spec is not None and spec.origin is not None


def host_platform() -> str:
    """Return operating system and processor, e.g. ``linux-x86_64``; what TensorRT's engines are bound to."""
    machine = platform.machine().lower()
    return f"{sys.platform}-{ {'amd64': 'x86_64', 'arm64': 'aarch64'}.get(machine, machine) }"


def dtype_name(dtype: Any) -> str:
    """Return NumPy's name of a ``DataType``."""
    return _DTYPES.get(dtype.name, str(dtype.name).lower())


@cache
def _load(name: str) -> Toolkit:
    spec = TOOLKITS[name]
    if not is_installed(name):
        raise MissingExtraError(spec.module, spec.extra)
    try:
        module = importlib.import_module(spec.module)
    except (ImportError, OSError) as error:  # the bindings load NVIDIA's libraries by hand
        if isinstance(error.__cause__ or error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise BuildError(
            f"'{spec.module}' is installed but cannot be loaded: {error}; reinstall it: pip install "
            f"--force-reinstall 'vpdeploy[{spec.extra}]'"
        ) from error
    if not hasattr(module, "Builder"):
        raise MissingExtraError(spec.module, spec.extra)
    toolkit = Toolkit(name, module)
    if name == "tensorrt" and version_numbers(toolkit.version)[:2] < OLDEST_TENSORRT:
        oldest = ".".join(map(str, OLDEST_TENSORRT))
        raise BuildError(f"TensorRT {toolkit.version} is too old, {oldest} or newer is needed; upgrade tensorrt")
    return toolkit


def version_numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, e.g. ``(10, 13, 0, 35)``; what follows them (``.post1``) is left out."""
    numbers: list[int] = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _logger_of(module: Any, keep: Any) -> Any:
    """Return a logger of the module: errors are kept, the rest goes to Python's logging."""
    severities = module.ILogger.Severity
    levels = {
        severities.WARNING: logging.DEBUG,  # warnings are about TensorRT's internals, not about what a user did
        severities.INFO: logging.DEBUG,
        severities.VERBOSE: 5,
    }

    class Collector(module.ILogger):  # type: ignore[misc]
        """Keeps errors for the one line that a user sees."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            """Take one message; called from TensorRT's threads."""
            if severity in (severities.ERROR, severities.INTERNAL_ERROR):
                keep(msg)
            _log.log(levels.get(severity, logging.DEBUG), "%s", msg)

    return Collector()


def choose_runtime(targets: tuple[str, ...] | None, gpu: Gpu | None) -> tuple[str, str]:
    """Return a runtime's name and why it was chosen.

    Args:
        targets: The GPU architectures asked for, or None.
        gpu: This machine's GPU, or None.

    Raises:
        MissingExtraError: None is installed.
    """
    installed = [name for name in TOOLKITS if is_installed(name)]
    if not installed:
        spec = TOOLKITS["tensorrt-rtx"]
        raise MissingExtraError(spec.module, spec.extra)
    if len(installed) == 1:
        return installed[0], "the only one installed"
    if gpu is None:
        return "tensorrt-rtx", "no GPU is here, and it needs none"
    if targets is not None and targets != (gpu.sm,):
        return "tensorrt-rtx", f"the other can build for this GPU alone ({gpu.sm})"
    return "tensorrt", f"it times its kernels on this GPU, {gpu.name}"
