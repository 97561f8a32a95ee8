"""Rewriting ONNX graphs: a pass a file, on onnx-ir's pass classes.

Each states when it applies and when it must not, refuses a graph that it is not for before it changes anything
(``onnx_ir.passes.PreconditionError``), and tells exactly whether it changed something: a second run never does.
"""

from __future__ import annotations

from vpdeploy_export.passes.exposing import ExposePass
from vpdeploy_export.passes.naming import NameByModulePass
from vpdeploy_export.passes.rounding import RoundPass
from vpdeploy_export.passes.slot import ZeroSlotPass
from vpdeploy_export.passes.table import TableConstantsPass, TableDefaultsPass
from vpdeploy_export.passes.widening import WidenPass

__all__ = [
    "ExposePass",
    "NameByModulePass",
    "RoundPass",
    "TableConstantsPass",
    "TableDefaultsPass",
    "WidenPass",
    "ZeroSlotPass",
]
