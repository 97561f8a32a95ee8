"""The deployed graph as torch modules: the backbone with everything foldable folded, typed in its final precision.

It is kept apart from the training model on purpose: the parity gate compares the two.
"""

from vpdeploy_export.graph.folded import FoldedGraph
from vpdeploy_export.graph.switchable import SwitchableGraph

__all__ = ["FoldedGraph", "SwitchableGraph"]
