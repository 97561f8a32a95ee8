"""An ONNX file becomes a TensorRT network, is compared with what it should be, and its builder is configured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vpdeploy.engines.plan import EngineOptions, EnginePlan
from vpdeploy.engines.profile import Profile
from vpdeploy.engines.target import sm_number
from vpdeploy.engines.toolkit import Toolkit, dtype_name
from vpdeploy.errors import BuildError
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.interface import Binding, Interface

_UNKNOWN = re.compile(r"Plugin not found|UNSUPPORTED_NODE|No importer registered|unsupported", re.IGNORECASE)


def parse_graph(toolkit: Toolkit, builder: Any, path: Path) -> tuple[Any, Any]:
    """Parse an ONNX file into a strongly typed network.

    It is parsed from the file, not from its bytes: only so can it be over 2 GB or have its weights in other files.

    Args:
        toolkit: The runtime.
        builder: Its ``Builder``.
        path: The ONNX file.

    Returns:
        The ``INetworkDefinition``, and the parser, which owns its weights and has to live as long.

    Raises:
        BuildError: The parser refuses the file; the message names the node and the operator.
    """
    module = toolkit.module
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = module.OnnxParser(network, toolkit.logger)
    parsed = parser.parse_from_file(str(path))
    if not parsed or not network.num_outputs:
        errors = [_explained(toolkit, parser.get_error(index)) for index in range(parser.num_errors)]
        reason = errors[0] if errors else toolkit.take_errors() or "it is no ONNX model"
        raise BuildError(f"{path}: {toolkit.spec.title} {toolkit.version} cannot read the graph: {reason}")
    return network, parser


def _explained(toolkit: Toolkit, error: Any) -> str:
    """Return a ``ParserError`` as text: the node, its operator and what is wrong."""
    description = " ".join(str(error.desc()).split())
    name, operator = str(error.node_name()), str(error.node_operator())
    if not operator:
        return f"{description}; export it again"
    unknown = _UNKNOWN.search(f"{error.code().name} {description}")
    state = "is not supported" if unknown else f"is refused ({description})"
    hint = "another --opset of vpdeploy export may avoid it"
    return f"operator {operator} of node '{name or error.node()}' {state}; {hint}"


def checked_interface(network: Any, artifact: Artifact) -> Interface:
    """Return an artifact's interface after comparing the network that was parsed from its graph with it.

    Args:
        network: An ``INetworkDefinition``.
        artifact: What it was parsed from.

    Raises:
        BuildError: An input or output is missing, superfluous, or of another shape or dtype.
    """
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    expected = artifact.interface
    _compare(artifact, "input", inputs, expected.inputs)
    _compare(artifact, "output", outputs, expected.outputs)
    return expected


def _compare(artifact: Artifact, kind: str, found: list[Any], expected: Mapping[str, Binding]) -> None:
    names = [tensor.name for tensor in found]
    if sorted(names) != sorted(expected):
        raise BuildError(
            f"{artifact.graph_path}: expected the {kind}s {sorted(expected)}, found {sorted(names)}; export again"
        )
    for tensor in found:
        binding = expected[tensor.name]
        dtype, shape = dtype_name(tensor.dtype), tuple(tensor.shape)
        sizes = tuple(-1 if isinstance(size, str) else size for size in binding.shape)
        named = _axis_names(tensor, shape, binding)
        if dtype != binding.dtype or shape != sizes or named != binding.shape:
            raise BuildError(
                f"{artifact.graph_path}: {kind} '{tensor.name}' should be {binding.dtype} {list(binding.shape)}, "
                f"found {dtype} {list(named)}; export again"
            )


def _axis_names(tensor: Any, shape: tuple[int, ...], binding: Binding) -> tuple[int | str, ...]:
    """Return a tensor's shape with the names that the parser kept of its dynamic axes.

    An output's names are not kept, nor are all by every version; where there is none, the expected one is assumed.
    """
    named: list[int | str] = list(shape)
    for axis, size in enumerate(shape):
        if size == -1:
            assumed = binding.shape[axis] if axis < len(binding.shape) else -1
            named[axis] = tensor.get_dimension_name(axis) or assumed
    return tuple(named)


_HARDWARE = {"same-sm": "SAME_COMPUTE_CAPABILITY", "ampere+": "AMPERE_PLUS"}
"""Names in ``HardwareCompatibilityLevel``; early versions of TensorRT 10 lack the first."""


def configure(toolkit: Toolkit, builder: Any, config: Any, plan: EnginePlan, interface: Interface) -> None:
    """Set targets, options and the optimization profile.

    Args:
        toolkit: The runtime.
        builder: Its ``Builder``.
        config: Its ``IBuilderConfig``, as created.
        plan: What to build.
        interface: The inputs that the profile gives shapes to.

    Raises:
        BuildError: The runtime refuses a setting.
    """
    module = toolkit.module
    if toolkit.spec.ahead_of_time:
        config.num_compute_capabilities = len(plan.targets)
        for index, sm in enumerate(plan.targets):
            capability = getattr(module.ComputeCapability, f"SM{sm_number(sm)}")
            if not config.set_compute_capability(capability, index):
                raise BuildError(f"{toolkit.spec.title} {toolkit.version} refuses the target {sm}")
    _set_options(toolkit, config, plan.options)
    _add_profile(toolkit, builder, config, plan.profile, interface)


def _set_options(toolkit: Toolkit, config: Any, options: EngineOptions) -> None:
    module = toolkit.module
    if options.version_compatible:
        # The lean runtime stays in the engine: without it, whoever loads it has to have the library of that version.
        config.set_flag(module.BuilderFlag.VERSION_COMPATIBLE)
    if options.weight_stripped:
        config.set_flag(module.BuilderFlag.STRIP_PLAN)
        config.set_flag(getattr(module.BuilderFlag, toolkit.spec.refit_flag))
    if options.hardware in _HARDWARE:
        level = getattr(module.HardwareCompatibilityLevel, _HARDWARE[options.hardware], None)
        if level is None:
            raise BuildError(
                f"--hardware {options.hardware}: {toolkit.spec.title} {toolkit.version} has no such level; upgrade it"
            )
        config.hardware_compatibility_level = level
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace_bytes)


def _add_profile(toolkit: Toolkit, builder: Any, config: Any, profile: Profile, interface: Interface) -> None:
    shapes = builder.create_optimization_profile()
    for name, binding in interface.inputs.items():
        shapes.set_shape(name, *profile.shapes_of(binding))
    if config.add_optimization_profile(shapes) < 0:
        raise BuildError(f"{toolkit.spec.title} refuses the profile: {toolkit.take_errors() or 'it gave no reason'}")
