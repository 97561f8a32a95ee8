"""The switchable graph with its table inside: inputs ``image`` and ``slot`` alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from vpdeploy.format.layout import CLASS_AXIS
from vpdeploy.table import Table
from vpdeploy_export.passes import TableConstantsPass
from vpdeploy_export.targets.target import Conversion


def constant_table(conversion: Conversion) -> tuple[ir.Model, Table]:
    """Return the graph with the table of all tasks as initializers, and the table; slots are in the bundle's order."""
    table = Table.of(conversion.prompt_sets)
    return conversion.graph(TableConstantsPass(table.arrays, table.sizes[CLASS_AXIS])), table


def task_facts(conversion: Conversion) -> dict[str, dict[str, Any]]:
    """Return what a client has to know of each task: its slot, labels and number of classes."""
    return {
        prompt_set.card.name: {
            "slot": slot,
            "version": conversion.artifact.versions[prompt_set.card.name],
            "classes": len(prompt_set.card.labels),
            "labels": list(prompt_set.card.labels),
        }
        for slot, prompt_set in enumerate(conversion.prompt_sets)
    }


def slots_of(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Return the slot of each task from what ``task_facts`` gave."""
    return {name: facts["slot"] for name, facts in tasks.items()}
