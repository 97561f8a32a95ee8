"""TensorRT's timing cache: kernels timed once on a GPU are not timed again by later builds with the same version."""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

from vpdeploy.engines.toolkit import Toolkit
from vpdeploy.files import locked, write_atomically
from vpdeploy.machine import Gpu

_log = logging.getLogger("vpdeploy.engines")


def timing_cache_path(toolkit: Toolkit, gpu: Gpu) -> Path:
    """Return the file for one GPU and version, in the user's cache folder."""
    gpu_name = re.sub(r"[^A-Za-z0-9]+", "-", gpu.name).strip("-")
    return _cache_folder() / "timing" / f"{toolkit.name}-{toolkit.version}-{gpu.sm}-{gpu_name}.cache"


def load_timing_cache(toolkit: Toolkit, config: Any, path: Path) -> None:
    """Give a builder configuration what earlier builds have timed; an unusable file is left out with a notice."""
    data = b""
    try:
        with locked(_lock_of(path)):
            data = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        _log.warning("%s: not read (%s); all kernels are timed anew", path, error.strerror)
    cache = config.create_timing_cache(data) if data else None
    if data and (cache is None or not config.set_timing_cache(cache, False)):
        toolkit.take_errors()
        _log.warning("%s: not a timing cache of this GPU and version; all kernels are timed anew", path)
        cache = None
    if cache is None:
        config.set_timing_cache(config.create_timing_cache(b""), False)


def save_timing_cache(config: Any, path: Path) -> None:
    """Merge what a build has timed into the file, which other builds may have changed meanwhile."""
    cache = config.get_timing_cache()
    if cache is None:
        return
    try:
        with locked(_lock_of(path)):
            other = config.create_timing_cache(path.read_bytes()) if path.is_file() else None
            if other is not None:
                cache.combine(other, False)
            write_atomically(path, bytes(memoryview(cache.serialize())))
    except OSError as error:
        # The engine is built; only the next build is slower.
        _log.warning("%s: not written (%s)", path, error.strerror)


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _cache_folder() -> Path:
    """Return where this platform keeps what may be deleted."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "vpdeploy" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vpdeploy"
