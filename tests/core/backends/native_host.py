"""The native runner on a device in the host's memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from core.backends.fake_tensorrt import Knobs, fake_module
from core.backends.host_device import HostDevice

from vpdeploy.backends.native.backend import NativeBackend
from vpdeploy.backends.native.engine import NativeEngine
from vpdeploy.backends.native.runtime_cache import RuntimeCache
from vpdeploy.engines.plan import EngineCard, EngineOptions, EnginePlan
from vpdeploy.engines.profile import AxisRange, Profile, present_sizes
from vpdeploy.engines.store import FoundEngine
from vpdeploy.engines.toolkit import Toolkit
from vpdeploy.files import sha256_of_file
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.layout import BATCH_AXIS
from vpdeploy.machine import Gpu

GPU = Gpu(name="Host GPU", sm="sm_89", memory_bytes=1 << 30, cuda_version="13.0")
BATCH = AxisRange(1, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Native:
    """A native runner and what tests see and change of what is below it."""

    backend: NativeBackend
    device: HostDevice
    knobs: Knobs


def write_engine(
    artifact: Artifact, folder: Path, *, runtime: str, batch: AxisRange = BATCH, options: EngineOptions | None = None
) -> FoundEngine:
    """An engine file that the fake module loads, and its card."""
    profile = Profile().add(BATCH_AXIS, batch).completed(artifact, present_sizes(artifact))
    interface = artifact.interface
    plan = EnginePlan(
        runtime=runtime,
        runtime_version="1.7.1.116",
        targets=("sm_89",),
        gpu_name=None,
        platform=None,
        precision=artifact.precision,
        profile=profile,
        graph_sha256=artifact.sha256,
        options=options or EngineOptions(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{plan.key}.engine"
    shapes = {name: profile.shapes_of(binding) for name, binding in interface.inputs.items()}
    path.write_bytes(json.dumps(shapes).encode() + b"\n" + artifact.graph_path.read_bytes())
    card = EngineCard.of(
        plan,
        layout_digest=None if artifact.layout is None else artifact.layout.digest,
        inputs=interface.inputs,
        outputs=interface.outputs,
        size_bytes=path.stat().st_size,
        sha256=sha256_of_file(path),
        build_seconds=1.0,
    )
    return FoundEngine(path=path, card=card)


def open_host(
    artifact: Artifact,
    folder: Path,
    *,
    runtime: str = "tensorrt",
    device: HostDevice | None = None,
    batch: AxisRange = BATCH,
    lanes: int = 2,
    knobs: Knobs | None = None,
    options: EngineOptions | None = None,
) -> Native:
    """Open the native runner of a graph; ``knobs`` are copied into the fake module before it is loaded."""
    device = device or HostDevice()
    found = write_engine(artifact, folder, runtime=runtime, batch=batch, options=options)
    module, own = fake_module(runtime, device)
    if knobs is not None:
        vars(own).update(vars(knobs))
    cache = RuntimeCache(found.path, GPU) if runtime == "tensorrt-rtx" else None
    engine = NativeEngine(Toolkit(runtime, module), found, artifact, device, cache)
    backend = NativeBackend(device, engine, gpu=GPU, reason="a test", cache=cache, lanes=lanes)
    return Native(backend=backend, device=device, knobs=own)
