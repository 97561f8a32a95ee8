"""Building an engine: plan it, see whether it is there, let NVIDIA's builder work, write it."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from vpdeploy.artifact import Artifact
from vpdeploy.engines.card import EngineCard
from vpdeploy.engines.configuration import configure
from vpdeploy.engines.diagnosis import explain_failure
from vpdeploy.engines.interface import checked_interface
from vpdeploy.engines.monitor import BuildProgress, OnProgress, monitor_of
from vpdeploy.engines.parsing import parse_graph
from vpdeploy.engines.plan import HARDWARE_LEVELS, EngineOptions, EnginePlan
from vpdeploy.engines.profile import Profile
from vpdeploy.engines.sizing import choose_profile, present_sizes
from vpdeploy.engines.store import ENGINE_SUFFIX, FoundEngine, engine_damage, list_engines
from vpdeploy.engines.target import choose_targets, sm_number
from vpdeploy.engines.timing import load_timing_cache, save_timing_cache, timing_cache_path
from vpdeploy.engines.toolkit import Toolkit, host_platform, load_toolkit
from vpdeploy.engines.writing import write_engine
from vpdeploy.errors import BuildError, SpecError
from vpdeploy.files import sha256_of_file
from vpdeploy.interface import Interface
from vpdeploy.machine import Gpu, find_gpu, gpu_obstacle

_T = TypeVar("_T")

_POLL_SECONDS = 0.1
_START_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What a user asks for.

    Attributes:
        runtime: A key of ``vpdeploy.engines.toolkit.TOOLKITS``.
        targets: GPU architectures as ``parse_targets`` returns them; None: this machine's GPU.
        profile: Ranges by axis; the others are chosen.
        options: How to build.
        force: Build even if the same engine is there.
    """

    runtime: str
    targets: tuple[str, ...] | None = None
    profile: Profile = field(default_factory=dict)
    options: EngineOptions = field(default_factory=EngineOptions)
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """What came of it.

    Attributes:
        engine: The file and its card.
        built: False if the same engine was there already.
        repaired: What was wrong with the engine of the same name that was replaced, or None.
    """

    engine: FoundEngine
    built: bool
    repaired: str | None = None


def build_engine(artifact: Artifact, request: BuildRequest, *, on_progress: OnProgress | None = None) -> BuildResult:
    """Build an engine of a graph, or find that the same one is there and whole.

    A ``KeyboardInterrupt`` in the caller's thread ends the build after its present step; nothing is written then.

    Args:
        artifact: What to build.
        request: For which runtime and GPUs, and how.
        on_progress: Called in the caller's thread about ten times a second.

    Raises:
        SpecError: The request does not fit the graph.
        MissingExtraError: The runtime is not installed.
        BuildError: It cannot be built here, or not written; what was there is as it was.
        BundleError: The graph or a task of the bundle is damaged.
    """
    toolkit = load_toolkit(request.runtime)
    gpu = find_gpu()
    plan = plan_engine(artifact, request, toolkit, gpu)
    repaired = None
    if not request.force:
        present, repaired = _present_engine(artifact, plan)
        if present is not None:
            return BuildResult(engine=present, built=False)
    progress = BuildProgress()
    data, interface, seconds = _interruptible(
        lambda: _compile(artifact, plan, toolkit, gpu, progress), progress, on_progress
    )
    card = EngineCard.of(
        plan,
        layout_digest=None if artifact.layout is None else artifact.layout.digest,
        inputs=interface.inputs,
        outputs=interface.outputs,
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        build_seconds=round(seconds, 3),
    )
    return BuildResult(engine=write_engine(artifact.engines_folder, data, card), built=True, repaired=repaired)


def plan_engine(artifact: Artifact, request: BuildRequest, toolkit: Toolkit, gpu: Gpu | None) -> EnginePlan:
    """Return what decides the engine that a request asks for.

    Args:
        artifact: What to build.
        request: What is asked for.
        toolkit: The runtime, loaded.
        gpu: This machine's, or None.

    Raises:
        SpecError: The request does not fit the graph, or the runtime lacks an option.
        BuildError: The runtime cannot build for the targets here.
    """
    targets = choose_targets(toolkit, request.targets, gpu)
    _check_options(toolkit, request.options, gpu)
    tuned_here = not toolkit.spec.ahead_of_time and request.options.hardware == "none"
    return EnginePlan(
        runtime=toolkit.name,
        runtime_version=toolkit.version,
        targets=targets,
        gpu_name=gpu.name if gpu is not None and tuned_here else None,
        platform=None if toolkit.spec.portable else host_platform(),
        precision=artifact.precision,
        profile=choose_profile(artifact, request.profile, present_sizes(artifact)),
        graph_sha256=artifact.sha256,
        options=request.options,
    )


def _check_options(toolkit: Toolkit, options: EngineOptions, gpu: Gpu | None) -> None:
    spec = toolkit.spec
    if options.hardware not in HARDWARE_LEVELS:
        raise SpecError(f"--hardware {options.hardware}: choose one of: {', '.join(HARDWARE_LEVELS)}")
    if options.version_compatible and not spec.version_compatible:
        raise SpecError(f"--version-compatible: {spec.title} has no such engines; build one for each version")
    if options.hardware != "none" and not spec.hardware_compatible:
        raise SpecError(f"--hardware: {spec.title} has no such levels; name every GPU with --target instead")
    if options.hardware == "ampere+" and gpu is not None and sm_number(gpu.sm) < sm_number("sm_80"):
        raise SpecError(f"--hardware ampere+: has to be built on Ampere or newer, here is {gpu.name} ({gpu.sm})")
    if options.weight_stripped and gpu is None:
        raise BuildError(
            f"--weight-stripped: {spec.title} needs a GPU for it, and here is none ({gpu_obstacle()}); "
            "leave it out, or run the command where one is"
        )


def _present_engine(artifact: Artifact, plan: EnginePlan) -> tuple[FoundEngine | None, str | None]:
    """Return the engine of a plan if it is there and whole; else what is wrong with its files, if there are any."""
    path = artifact.engines_folder / f"{plan.key}{ENGINE_SUFFIX}"
    card = dict(list_engines(artifact)).get(path)
    if card is None or isinstance(card, str):
        return None, card
    found = FoundEngine(path=path, card=card)
    damage = engine_damage(found)
    return (None, damage) if damage else (found, None)


def _compile(
    artifact: Artifact, plan: EnginePlan, toolkit: Toolkit, gpu: Gpu | None, progress: BuildProgress
) -> tuple[memoryview, Interface, float]:
    """Return the serialized engine, its interface, and how many seconds the builder took."""
    toolkit.take_errors()
    builder = toolkit.module.Builder(toolkit.logger)
    network, parser = parse_graph(toolkit, builder, artifact.graph_path)
    interface = checked_interface(network, artifact)
    config = builder.create_builder_config()
    configure(toolkit, builder, config, plan, interface)
    cache = timing_cache_path(toolkit, gpu) if toolkit.spec.times_kernels and gpu is not None else None
    if cache is not None:
        load_timing_cache(toolkit, config, cache)
    monitor = monitor_of(toolkit.module, progress)  # has to outlive the build; TensorRT does not own it
    config.progress_monitor = monitor
    toolkit.take_errors()
    started = time.perf_counter()
    serialized = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - started
    if serialized is None:
        raise BuildError(explain_failure(toolkit.take_errors(), plan))
    if cache is not None:
        save_timing_cache(config, cache)
    del parser  # owns the weights that the builder read
    _require_unchanged(artifact, plan)
    return memoryview(serialized), interface, seconds


def _require_unchanged(artifact: Artifact, plan: EnginePlan) -> None:
    """Check that the graph is still the one that was planned for: an export may have replaced it meanwhile."""
    if not artifact.graph_path.is_file() or sha256_of_file(artifact.graph_path) != plan.graph_sha256:
        raise BuildError(f"{artifact.graph_path}: was replaced while the engine was being built; run the command again")


def _interruptible(work: Callable[[], _T], progress: BuildProgress, on_progress: OnProgress | None) -> _T:
    """Run ``work`` in a thread of its own, so that signals and the progress bar are served meanwhile.

    All of NVIDIA's code runs there: a ``KeyboardInterrupt`` that arrives in one of its callbacks, a log message of the
    parser for one, would be swallowed by the library.
    """
    results: list[_T] = []
    errors: list[BaseException] = []
    # Not Thread.join: interrupted by a signal, it takes the thread for ended (CPython issue 90882, until 3.13).
    begun, ended = threading.Event(), threading.Event()

    def run() -> None:
        begun.set()
        try:
            if not progress.cancelled:
                results.append(work())
        except BaseException as error:  # raised again in the caller's thread
            errors.append(error)
        finally:
            ended.set()

    try:
        threading.Thread(target=run, name="vpdeploy-build", daemon=True).start()
        while not ended.wait(_POLL_SECONDS):
            if on_progress is not None:
                on_progress(*progress.snapshot())
        if on_progress is not None:
            on_progress(*progress.snapshot())
    except BaseException:
        progress.cancel()
        # A thread that has not begun by then was never started, or will find the build cancelled.
        if begun.wait(_START_SECONDS):
            ended.wait()
        raise
    if errors:
        raise errors[0]
    return results[0]
