"""``ep-context``: an ONNX model that ONNX Runtime's TensorRT or TensorRT-RTX provider has compiled ahead of time.

The compiled graph is one ``EPContext`` node, written by ``onnxruntime.ModelCompiler``
(https://onnxruntime.ai/docs/execution-providers/EP-Context-Design.html). Profiles are explicit: without them these
providers build again for every new shape (``trt_profile_min_shapes`` in
https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html, ``nv_profile_min_shapes`` in
https://onnxruntime.ai/docs/execution-providers/TensorRTRTX-ExecutionProvider.html).
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import onnx_ir as ir

from vpdeploy.backends.providers import (
    PROVIDERS,
    RTX_PROVIDER,
    TENSORRT_PROVIDER,
    onnxruntime,
    ort_errors,
    plugin_devices,
    plugin_of,
)
from vpdeploy.errors import BackendError, BuildError, SpecError
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.layout import IMAGE, SLOT
from vpdeploy.format.manifest import GRAPH_FILE
from vpdeploy_export.onnx.save import save_model
from vpdeploy_export.parity import TOLERANCES
from vpdeploy_export.targets.constant import constant_table, slots_of, task_facts
from vpdeploy_export.targets.runtime import PlainSession, SlotAnswerer
from vpdeploy_export.targets.target import Conversion, Target, TargetOptions, Written

DEFAULT_MAX_BATCH: Final = 32
NOTHING_WRITTEN: Final = "nothing was written"

PROFILE_PREFIXES: Final = {TENSORRT_PROVIDER: "trt_profile", RTX_PROVIDER: "nv_profile"}
"""How the options of the providers that write EPContext models begin; the CPU and CUDA providers compile nothing."""


def profile_options(provider: str, *, image_size: int, max_batch: int) -> dict[str, str]:
    """Return the options for one profile: batches from 1 to ``max_batch``, which is also the optimum."""
    prefix = PROFILE_PREFIXES[provider]

    def shapes(batch: int) -> str:
        return f"{IMAGE}:{batch}x{image_size}x{image_size}x3,{SLOT}:{batch}"

    return {
        f"{prefix}_min_shapes": shapes(1),
        f"{prefix}_opt_shapes": shapes(max_batch),
        f"{prefix}_max_shapes": shapes(max_batch),
    }


def session_options(provider: str, options: dict[str, str]) -> Any:
    """Return the options of a compiler that compiles for the provider: built in, or through its plug-in's devices.

    Raises:
        BackendError: The provider cannot be started.
    """
    settings = onnxruntime().SessionOptions()
    with ort_errors(f"{provider} cannot be started", advice=NOTHING_WRITTEN):
        if (plugin := plugin_of(PROVIDERS[provider])) is not None:
            settings.add_provider_for_devices(plugin_devices(plugin), options)
        else:
            settings.add_provider(provider, options)
    return settings


def compile_model(source: Path, out: Path, settings: Any) -> None:
    """Write the EPContext model of ``source``; its engine lies beside ``out``.

    Raises:
        BuildError: The provider could not compile the graph, or left it to others.
    """
    module = onnxruntime()
    flags = module.OrtCompileApiFlags.ERROR_IF_NO_NODES_COMPILED
    with ort_errors("the graph cannot be compiled", advice=NOTHING_WRITTEN, kind=BuildError):
        compiler = module.ModelCompiler(settings, str(source), embed_compiled_data_into_model=False, flags=flags)
        compiler.compile_to_file(str(out))
    others = {node.op_type for node in ir.load(out).graph if node.op_type != "EPContext"}
    if others:
        raise BuildError(
            f"the provider left operators to others ({', '.join(sorted(others))}), expected one EPContext node; "
            f"{NOTHING_WRITTEN}; export with --opset 20, or use vpdeploy build"
        )


def _provider(options: TargetOptions) -> str:
    return TENSORRT_PROVIDER if options.provider is None else options.provider


def _check(artifact: Artifact, options: TargetOptions) -> None:
    """Refuse what cannot be compiled here, before anything is read.

    Raises:
        SpecError: The provider has no EPContext models, or the batch is impossible.
        BackendError: There is no GPU to compile for, or the provider is not installed.
    """
    provider = _provider(options)
    if provider not in PROFILE_PREFIXES:
        raise SpecError(
            f"--provider '{provider}': it has no EPContext models; choose one of {', '.join(PROFILE_PREFIXES)}"
        )
    if options.max_batch is not None and options.max_batch < 1:
        raise SpecError(f"--max-batch {options.max_batch}: should be at least 1")
    if (obstacle := PROVIDERS[provider].obstacle(artifact)) is not None:
        raise BackendError(f"{provider} compiles for the GPU that is here, and does not work here: {obstacle}")


def _write(conversion: Conversion, folder: Path) -> Written:
    """Compile the graph with its table inside; it answers on the GPU."""
    provider = _provider(conversion.options)
    artifact = conversion.artifact
    max_batch = DEFAULT_MAX_BATCH if conversion.options.max_batch is None else conversion.options.max_batch
    options = profile_options(provider, image_size=artifact.preprocessing.image_size, max_batch=max_batch)
    model, _ = constant_table(conversion)
    with TemporaryDirectory(prefix=".source.", dir=folder) as hidden:
        source = Path(hidden) / GRAPH_FILE
        save_model(model, source)
        compile_model(source, folder / GRAPH_FILE, session_options(provider, options))
    tasks = task_facts(conversion)
    session = PlainSession(folder / GRAPH_FILE, provider)
    return Written(
        graph={"file": GRAPH_FILE, "provider": provider, "provider_options": options},
        tasks=tasks,
        answerer=SlotAnswerer(session=session, slots=slots_of(tasks), max_batch=max_batch),
        tolerance=TOLERANCES[artifact.precision].converted_on_gpu,
        next_step=f"onnxruntime.InferenceSession('{GRAPH_FILE}', providers=['{provider}'])",
    )


EP_CONTEXT = Target(takes=frozenset({"max_batch", "provider"}), check=_check, write=_write)
