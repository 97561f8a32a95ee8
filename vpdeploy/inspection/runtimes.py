"""Which runtimes can run a graph on this machine."""

from __future__ import annotations

from vpdeploy.backends import RUNTIMES
from vpdeploy.deployed import DeployedGraph
from vpdeploy.errors import VpdeployError

WORKS = "works"


def describe_runtimes(graph: DeployedGraph) -> dict[str, str]:
    """Return ``works``, or why not, for each runtime by name; no graph and no engine is loaded."""
    return {name: _obstacle(graph, name) or WORKS for name in RUNTIMES}


def _obstacle(graph: DeployedGraph, name: str) -> str | None:
    try:
        return RUNTIMES[name].obstacle(graph)
    except VpdeployError as error:  # what a runtime needs is not installed: that is its obstacle
        return str(error)
