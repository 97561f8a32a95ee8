"""The place that an export writes to: what is there already, and whether it may go, stay or grow.

All of it is found out without a graph, a model or torch, so that a refusal comes at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from vpdeploy.errors import BundleCorruptError, BundleError, BundleVersionError, LayoutMismatchError, SpecError
from vpdeploy.format.bundle import Bundle, check_replaceable, is_bundle
from vpdeploy.format.folded import FoldedCard
from vpdeploy.format.graphfacts import Precision
from vpdeploy.format.layout import Family
from vpdeploy.format.manifest import Manifest
from vpdeploy.format.task import TaskCard

Existing = Literal["refuse", "update", "replace"]
"""What an export does where there is something already: refuse, add to it and keep all else, or drop what is there."""

_NAMED = 5  # tasks that one line of an error lists


def check_bundle_place(path: Path, tasks: Sequence[str], existing: Existing) -> None:
    """Check that a bundle of some tasks may be written at a path.

    Args:
        path: The folder.
        tasks: Names of the tasks that are going to be exported.
        existing: What is to become of a bundle that is there.

    Raises:
        BundleError: There is a bundle and ``existing`` is ``refuse``: the message names what it would lose; there is
            none and ``existing`` is ``update``; or there is something else.
    """
    check_replaceable(path)
    _check_writable(path)
    if not is_bundle(path):
        if existing == "update":
            raise BundleError(f"{path}: there is no bundle to update; leave --update out to write one")
    elif existing == "refuse":
        raise BundleError(
            f"{path}: holds a bundle, and to write it anew would drop {_losses(Bundle.open(path).manifest, tasks)}; "
            "give --update to keep what is there, or --replace to drop it"
        )


def check_update(
    path: Path,
    cards: Sequence[TaskCard],
    *,
    precision: Precision | None = None,
    opset: int | None = None,
    family: Family | None = None,
) -> Bundle:
    """Check that a bundle's own graph can take tasks, as far as that shows without their prompts.

    Args:
        path: The bundle.
        cards: What is known of the tasks.
        precision: The precision that was asked for; None is the bundle's.
        opset: The ONNX opset that was asked for; None is the bundle's.
        family: The kinds of prompts that were asked for; None is the bundle's.

    Returns:
        The bundle.

    Raises:
        BundleError: The bundle cannot be read, or not be written to.
        SpecError: Another graph than the bundle's was asked for.
        LayoutMismatchError: A task belongs to another backbone or preprocessing.
    """
    bundle = Bundle.open(path)
    _check_writable(path)
    manifest = bundle.manifest
    asked = {
        "precision": (precision, manifest.graph.precision),
        "opset": (opset, manifest.graph.opset),
        "layout": (family, manifest.layout.family),
    }
    for name, (wanted, found) in asked.items():
        if wanted not in (None, found):
            raise SpecError(
                f"{path}: its graph has {name} {found}, and {wanted} was asked for; an update keeps the graph: leave "
                "that out, or export the runs of all its tasks anew with --replace"
            )
    for card in cards:
        try:
            manifest.check_card(card)
        except LayoutMismatchError as error:
            raise LayoutMismatchError(
                f"{path}: {error}; export it into another bundle, or drop this one's tasks with --replace"
            ) from error
    return bundle


def check_file_place(path: Path, task: str, existing: Existing) -> None:
    """Check that a folded model may be written at a path: over nothing, or over what was exported of the same task.

    Args:
        path: The file.
        task: Name of the task that is going to be exported.
        existing: ``replace`` lets go of another task's model; what is no model of ours is never replaced.

    Raises:
        SpecError: ``existing`` is ``update``: a folded model is written as a whole.
        BundleError: There is a folder, another task's model, or a file that no export wrote.
    """
    if existing == "update":
        raise SpecError(f"{path}: --update is for bundles; a folded model is written as a whole, leave --update out")
    if path.is_dir():
        raise BundleError(f"{path}: is a folder; give the name of an .onnx file")
    _check_writable(path.parent)
    if not path.exists() or (path.is_file() and path.stat().st_size == 0):
        return
    advice = "give another --out"
    if not path.is_file():
        raise BundleError(f"{path}: exists and is not a file; {advice}")
    try:
        found = f"task '{FoldedCard.read(path).task.name}'"
    except (BundleCorruptError, BundleVersionError) as error:
        found = f"a model that cannot be read here ({error})"
    except BundleError as error:
        raise BundleError(f"{path}: exists and was not written by vpdeploy export; {advice} or remove it") from error
    if found != f"task '{task}'" and existing != "replace":
        raise BundleError(f"{path}: holds {found}, not task '{task}'; {advice}, or --replace to drop it")


def _check_writable(folder: Path) -> None:
    """Check that something can be written into a folder, or into the nearest one above it that is there.

    Raises:
        BundleError: It is a file, or may not be written to.
    """
    real = Path(os.path.realpath(folder))
    nearest = next(each for each in (real, *real.parents) if each.exists())
    if not nearest.is_dir():
        raise BundleError(f"{folder}: cannot be written, {nearest} is not a folder; choose another place")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise BundleError(f"{folder}: cannot be written, {nearest} is read-only here; choose another place")


def _losses(manifest: Manifest, tasks: Sequence[str]) -> str:
    """Return in words what a bundle loses that is written anew with some tasks."""
    dropped = [name for name in manifest.tasks if name not in tasks]
    kept = [name for name in manifest.tasks if name in tasks]
    parts = []
    if dropped:
        parts.append(f"task{'s' if len(dropped) > 1 else ''} {_listed(dropped)}")
    if kept:
        parts.append("the versions so far of " + _listed([_versions(manifest, name) for name in kept]))
    return " and ".join(parts) or "its graph"


def _versions(manifest: Manifest, task: str) -> str:
    return f"{task} ({', '.join(map(str, sorted(manifest.tasks[task].files)))})"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
