"""What NVIDIA's builder says when it fails, and what a user can do about it."""

from __future__ import annotations

import re

from vpdeploy.engines.plan import EnginePlan
from vpdeploy.engines.target import MODELS
from vpdeploy.engines.toolkit import TOOLKITS

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
