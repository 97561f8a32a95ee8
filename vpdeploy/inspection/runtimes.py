"""Which runtimes can run a graph on this machine."""

from __future__ import annotations

from vpdeploy.artifact import Artifact
from vpdeploy.backends import RUNTIMES
from vpdeploy.errors import VpdeployError

WORKS = "works"


def describe_runtimes(artifact: Artifact) -> dict[str, str]:
    """Return ``works``, or why not, for each runtime by name; no graph and no engine is loaded."""
    return {name: _obstacle(artifact, name) or WORKS for name in RUNTIMES}


def _obstacle(artifact: Artifact, name: str) -> str | None:
    try:
        return RUNTIMES[name].obstacle(artifact)
    except VpdeployError as error:  # what a runtime needs is not installed: that is its obstacle
        return str(error)
