"""The runtimes that the tests of every backend are run for."""

from __future__ import annotations

import pytest

from vpdeploy.backends import RUNTIMES
from vpdeploy.machine import gpu_obstacle

ON_HOST = ("host tensorrt", "host tensorrt-rtx")
"""The native runner on a device in the host's memory."""

GPU_RUNTIMES = tuple(name for name in RUNTIMES if name != "onnxruntime-cpu")

_TRIED = GPU_RUNTIMES if gpu_obstacle() is None else ()  # one line says what is skipped, not one for each test
CASES = ["onnxruntime-cpu", *ON_HOST, *(pytest.param(name, marks=pytest.mark.gpu) for name in _TRIED)]
