"""Building an engine: plan it, see whether it is there, let NVIDIA's builder work, write it or explain its failure."""

from __future__ import annotations

import hashlib
import re
import time
from dataclasses import dataclass, field

from vpdeploy.engines.network import checked_interface, configure, parse_graph
from vpdeploy.engines.plan import HARDWARE_LEVELS, EngineCard, EngineOptions, EnginePlan
from vpdeploy.engines.profile import Profile, present_sizes
from vpdeploy.engines.progress import BuildProgress, OnProgress, interruptible, monitor_of
from vpdeploy.engines.store import FoundEngine, engine_damage, list_engines, write_engine
from vpdeploy.engines.target import MODELS, choose_targets, sm_number
from vpdeploy.engines.timing_cache import load_timing_cache, save_timing_cache, timing_cache_path
from vpdeploy.engines.toolkit import TOOLKITS, Toolkit, host_platform, load_toolkit
from vpdeploy.errors import BuildError, SpecError
from vpdeploy.files import sha256_of_file
from vpdeploy.format.artifact import ENGINE_SUFFIX, Artifact
from vpdeploy.format.interface import Interface
from vpdeploy.machine import Gpu, find_gpu, gpu_obstacle


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What a user asks for.

    Attributes:
        runtime: A key of ``vpdeploy.engines.toolkit.TOOLKITS``.
        targets: GPU architectures as ``parse_targets`` returns them; None: this machine's GPU.
        profile: The sizes that the engine has to take; axes without a range are chosen.
        options: How the engine is built.
        force: Whether to build even if the same engine is there.
    """

    runtime: str
    targets: tuple[str, ...] | None = None
    profile: Profile = field(default_factory=Profile)
    options: EngineOptions = field(default_factory=EngineOptions)
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """What came of it.

    Attributes:
        engine: The engine's file and its card.
        built: Whether it was built now; the same engine was there already otherwise.
        repaired: What was wrong with the engine of the same name that was replaced, or None.
    """

    engine: FoundEngine
    built: bool
    repaired: str | None = None


def build_engine(artifact: Artifact, request: BuildRequest, *, on_progress: OnProgress | None = None) -> BuildResult:
    """Build an engine of a graph, or find that the same one is there and whole.

    A ``KeyboardInterrupt`` in the caller's thread ends the build after its present step; nothing is written then.

    Args:
        artifact: The bundle or folded model whose graph is built.
        request: The runtime and the GPUs to build for, and how to build.
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

    # An engine of an equal plan has an equal key: if its files are whole, there is nothing to do.
    repaired = None
    if not request.force:
        present, repaired = _present_engine(artifact, plan)
        if present is not None:
            return BuildResult(engine=present, built=False)

    # NVIDIA's code runs in a thread of its own, so that Ctrl-C and the progress bar are served meanwhile.
    progress = BuildProgress()
    data, interface, seconds = interruptible(
        lambda: _compile(artifact, plan, toolkit, gpu, progress), progress, on_progress
    )

    # The card says what came of the plan; it is written after the engine, and makes it exist.
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
        artifact: The bundle or folded model whose graph is built.
        request: What a user asks for.
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
        profile=request.profile.completed(artifact, present_sizes(artifact)),
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
    # Parse the graph, and compare it with what the artifact says of it before anything is built on that.
    toolkit.take_errors()
    builder = toolkit.module.Builder(toolkit.logger)
    network, parser = parse_graph(toolkit, builder, artifact.graph_path)
    interface = checked_interface(network, artifact)

    # Tell the builder what to build, and what earlier builds have timed.
    config = builder.create_builder_config()
    configure(toolkit, builder, config, plan, interface)
    cache = timing_cache_path(toolkit, gpu) if toolkit.spec.times_kernels and gpu is not None else None
    if cache is not None:
        load_timing_cache(toolkit, config, cache)

    # Build; what the builder logs from here on explains its failure.
    monitor = monitor_of(toolkit.module, progress)  # has to outlive the build; TensorRT does not own it
    config.progress_monitor = monitor
    toolkit.take_errors()
    started = time.perf_counter()
    serialized = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - started
    if serialized is None:
        raise BuildError(explain_failure(toolkit.take_errors(), plan))

    # Keep what was timed, and check that what was built is still what lies there.
    if cache is not None:
        save_timing_cache(config, cache)
    del parser  # owns the weights that the builder read
    _require_unchanged(artifact, plan)
    return memoryview(serialized), interface, seconds


def _require_unchanged(artifact: Artifact, plan: EnginePlan) -> None:
    """Check that the graph is still the one that was planned for: an export may have replaced it meanwhile."""
    if not artifact.graph_path.is_file() or sha256_of_file(artifact.graph_path) != plan.graph_sha256:
        raise BuildError(f"{artifact.graph_path}: was replaced while the engine was being built; run the command again")


_LONGEST = 600

_PLACES = re.compile(r"IBuilder::\w+: | In \w+ at \S+:\d+\)?|\[\w+\.\w+:\d+: \w+\] |\[\w+\.cpp::\w+::\d+\] ")
_NO_DRIVER = re.compile(r"[^;]*cudaError 35[^;]*(; )?")


def explain_failure(errors: str, plan: EnginePlan) -> str:
    """Return why a build failed and what to do, in one line.

    The phrases are those of TensorRT-RTX 1.7.1, tried; what is not known is passed on as it is.

    Args:
        errors: What the builder logged, as ``Toolkit.take_errors`` returns it.
        plan: What was being built.
    """
    title = TOOLKITS[plan.runtime].title
    where = f"{title} {plan.runtime_version} cannot build a {plan.precision} engine for {', '.join(plan.targets)}: "

    # What a GPU of the targets has no arithmetic or no kernel for.
    turing = f"leave out sm_75 ({MODELS['sm_75']})"
    if "FP32 GEMM is not supported" in errors:
        if plan.precision == "fp16":  # the probe of the export found activations that float16 does not hold
            return f"{where}parts of the graph are float32 (vpdeploy inspect names them), which sm_75 cannot; {turing}"
        return f"{where}sm_75 has no float32 matrix products there; export with --fp16, or {turing}"
    if "HW-specific datatypes: b16" in errors:
        return f"{where}sm_75 has no bfloat16; export with --fp16, or {turing}"
    if "dedicated kernel" in errors or "decomposable" in errors:
        other = "--fp16 or --opset 20" if plan.precision == "fp32" else "--opset 20"
        return f"{where}it has no kernel for an Attention operator of this type and head width; export with {other}"

    # What the machine lacks.
    if "workspace limit" in errors or "OutOfMemory" in errors or "out of memory" in errors.lower():
        limit = plan.options.workspace_bytes
        remedy = "raise --workspace-mb" if limit is not None else "free memory, or lower MAX of --batch and --slots"
        return f"{where}it ran out of memory ({_shortened(errors)}); {remedy}"
    if "CUDA_SUCCESS" in errors:
        return f"{where}this needs a GPU and its driver ({_shortened(errors)}); run the command where one is"
    return f"{where}{_shortened(errors) or 'it gave no reason'}"


def _shortened(errors: str) -> str:
    """Return the log without places in NVIDIA's sources, and without the complaint about a missing driver."""
    text = _PLACES.sub("", _NO_DRIVER.sub("", errors)).strip("; ")
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."
