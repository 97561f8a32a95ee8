"""An ONNX file becomes a TensorRT network; what the parser refuses becomes one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vpdeploy.engines.toolkit import Toolkit
from vpdeploy.errors import BuildError

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
