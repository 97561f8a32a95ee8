"""Importing checkpoints of the public VPT, E²VPT and VAPT code as runs.

A format is one file and one line in ``FORMATS``.
"""

from __future__ import annotations

from typing import Final

from vpdeploy.errors import SpecError
from vpdeploy_train.importing import e2vpt, vapt, vpt
from vpdeploy_train.importing.checkpoint import Checkpoint, first_with
from vpdeploy_train.importing.reference import ReferenceFormat

FORMATS: Final[dict[str, ReferenceFormat]] = {"vapt": vapt.FORMAT, "e2vpt": e2vpt.FORMAT, "vpt": vpt.FORMAT}
"""By the name that ``--format`` takes; the first whose marks a checkpoint has is its own."""


def format_named(name: str) -> ReferenceFormat:
    """Return a format by name.

    Raises:
        SpecError: There is none of that name.
    """
    if name not in FORMATS:
        raise SpecError(f"--format '{name}': choose one of {', '.join(sorted(FORMATS))}")
    return FORMATS[name]


def require_format(checkpoint: Checkpoint, name: str) -> ReferenceFormat:
    """Return the format of that name if the checkpoint is of it.

    Raises:
        SpecError: The checkpoint is of another, or of none; the message names the key that tells.
    """
    wanted = format_named(name)
    for found, candidate in FORMATS.items():
        key = first_with(checkpoint.keys, candidate.marks)
        if key is None:
            continue
        if found == name:
            return wanted
        raise SpecError(
            f"{checkpoint.source}: --format {name} asks for {wanted.title}, but '{key}' is {candidate.title}'s"
            f"{'' if candidate is not vpt.FORMAT else f' and no key is special to {wanted.title}'}; "
            f"use --format {found}"
        )
    raise SpecError(
        f"{checkpoint.source}: none of its {len(checkpoint.keys)} keys is a prompt's, e.g. "
        f"'enc.transformer.prompt_embeddings'; expected a checkpoint of the public VPT, E²VPT or VAPT code with a ViT"
    )
