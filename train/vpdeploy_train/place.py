"""The folder that a run is written to: whether it may be used, and what its task is called.

All of it is found out without torch, so that a refusal comes at once.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Final

from vpdeploy.errors import SpecError
from vpdeploy.files import write_atomically
from vpdeploy.format.run import ARGS_FILE, STATE_FOLDER
from vpdeploy.format.task import check_task_name
from vpdeploy.text import shell_path

SKIPPED_FILE: Final = "skipped.txt"
"""Images that ``--skip-corrupt`` left out, one a line with what is wrong; absent where there are none."""

NAME_FILE: Final = "name.txt"
"""Beside what ``--resume`` needs: the task's name, which is no setting of a training."""


def check_new_place(out: Path) -> None:
    """Check that a folder may be written to by something new: it does not exist, or is empty.

    What a training leaves that was killed while it noted its beginning counts as nothing: it cannot be continued.

    Raises:
        SpecError: It is a file, or holds something.
    """
    if out.is_file() or (out.is_dir() and not _leftovers(out) >= {*out.iterdir()}):
        continued = "continue it with --resume, or " if (out / ARGS_FILE).is_file() else ""
        raise SpecError(f"{out}: exists and is not empty; {continued}give another --out")


def check_begun(out: Path) -> None:
    """Check that a folder holds a run that can be continued.

    Raises:
        SpecError: Nothing was begun there.
    """
    if not (out / ARGS_FILE).is_file():
        raise SpecError(f"{out}: nothing to resume, {ARGS_FILE} is missing; start without --resume")


def task_name_for(out: Path) -> str:
    """Return the name that a run folder gives its task: the folder's own, as it is.

    Raises:
        SpecError: The folder's name cannot name a task.
    """
    name = out.resolve().name
    try:
        return check_task_name(name)
    except SpecError as error:
        near = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("._-")[:64]
        example = f", e.g. --name {near}" if near and name.isascii() else ""
        raise SpecError(f"{error}; it is the name of the run folder, so give another with --name{example}") from None


def choose_task_name(out: Path, *, name: str | None, resume: bool) -> str:
    """Return what the task of a run is called: the given name, that of the run that is continued, or the folder's.

    Args:
        out: The run folder.
        name: The name that is asked for; None where there is none.
        resume: Whether the run in the folder is continued.

    Raises:
        SpecError: It cannot name a task.
    """
    if name is not None:
        return check_task_name(name)
    stored = out / STATE_FOLDER / NAME_FILE
    if resume and stored.is_file():
        return check_task_name(stored.read_text(encoding="utf-8").strip())
    return task_name_for(out)


def note_beginning(out: Path, *, name: str, skipped: str, settings: str) -> None:
    """Write down what a run needs to be continued.

    The settings come last, for they make the folder one that can be continued; until then it counts as empty.

    Args:
        out: The run folder, which was free.
        name: The task's name.
        skipped: The list of images that are left out; empty where there are none.
        settings: The settings as TOML.

    Raises:
        OSError: The folder cannot be written.
    """
    for each in _leftovers(out):
        shutil.rmtree(each) if each.is_dir() else each.unlink()
    note_task_name(out, name)
    if skipped:
        write_atomically(out / SKIPPED_FILE, skipped.encode())
    write_atomically(out / ARGS_FILE, settings.encode())


def note_task_name(out: Path, name: str) -> None:
    """Write the task's name where a run that continues finds it."""
    write_atomically(out / STATE_FOLDER / NAME_FILE, f"{name}\n".encode())


def _leftovers(out: Path) -> set[Path]:
    """Return what a folder holds of a training that was killed before its settings were written."""
    state = out / STATE_FOLDER
    if (out / ARGS_FILE).exists() or not state.is_dir():
        return set()
    if any(each.name != NAME_FILE and not _is_partial(each.name, NAME_FILE) for each in state.iterdir()):
        return set()
    return {
        each
        for each in out.iterdir()
        if each == state or each.name == SKIPPED_FILE or _is_partial(each.name, SKIPPED_FILE, ARGS_FILE)
    }


def _is_partial(name: str, *files: str) -> bool:
    """Tell whether a name is that of the temporary sibling of a file that is being written."""
    return name.endswith(".partial") and any(name.startswith(f".{file}.") for file in files)


def resume_command(out: Path, *, threads: int | None = None) -> str:
    """Return the command line that continues a run, to be pasted into a shell; the settings are in the run.

    Args:
        out: The run folder.
        threads: CPU threads that were asked for; None where none were.
    """
    chosen = "" if threads is None else f" --threads {threads}"
    return f"vpdeploy train --out {shell_path(out)} --resume{chosen}"
