"""Rewriting ONNX graphs, one small pass a file, each on onnx-ir's pass classes and tested alone."""

from __future__ import annotations

from vpdeploy_export.passes.naming import NameByModulePass

__all__ = ["NameByModulePass"]
