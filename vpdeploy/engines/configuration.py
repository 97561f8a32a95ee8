"""A plan becomes an ``IBuilderConfig``."""

from __future__ import annotations

from typing import Any

from vpdeploy.engines.plan import EngineOptions, EnginePlan
from vpdeploy.engines.profile import Profile
from vpdeploy.engines.sizing import shapes_of
from vpdeploy.engines.target import sm_number
from vpdeploy.engines.toolkit import Toolkit
from vpdeploy.errors import BuildError
from vpdeploy.interface import Interface

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
        shapes.set_shape(name, *shapes_of(binding, profile))
    if config.add_optimization_profile(shapes) < 0:
        raise BuildError(f"{toolkit.spec.title} refuses the profile: {toolkit.take_errors() or 'it gave no reason'}")
