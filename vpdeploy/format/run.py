"""A run as its ``task.json`` tells it, read and compared with its files without loading a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpdeploy.errors import BundleCorruptError, BundleError
from vpdeploy.files import sha256_of_file
from vpdeploy.format.document import Document
from vpdeploy.format.task import TaskCard
from vpdeploy.text import shell_path

CARD_FILE = "task.json"
TENSOR_FILE = "prompts.safetensors"
ARGS_FILE = "args.toml"
STATE_FOLDER = "state"
FORMAT = "vpdeploy.run"
FORMAT_VERSION = 2
"""Version 2 records the sha256 of the files beside the card; a run of version 1 is read unchecked."""


@dataclass(frozen=True, kw_only=True)
class RunCard:
    """What ``task.json`` says of a run.

    Attributes:
        path: The run folder.
        task: What is known of the task.
        digests: sha256 by name of the files that belong to the card; empty in a run of version 1.
        document: The whole document; training reads its own fields of it.
    """

    path: Path
    task: TaskCard
    digests: Mapping[str, str]
    document: Document

    @classmethod
    def read(cls, path: Path) -> RunCard:
        """Read a run's card; the files that it names are compared by ``verify``.

        Raises:
            BundleError: The folder is no finished run.
            BundleCorruptError: The card is damaged.
            BundleVersionError: It was written in another format version.
        """
        if not (path / CARD_FILE).is_file():
            unfinished = (path / ARGS_FILE).is_file()
            advice = (
                f"finish it with: vpdeploy train --out {shell_path(path)} --resume"
                if unfinished
                else "write one with vpdeploy train"
            )
            raise BundleError(f"{path}: not a finished run, {CARD_FILE} is missing; {advice}")
        document = Document.read(path / CARD_FILE)
        version = document.expect_format(FORMAT, 1, FORMAT_VERSION)
        return cls(
            path=path,
            task=TaskCard.from_document(document.nested("task")),
            digests={} if version == 1 else _digests(document.nested("files")),
            document=document,
        )

    def verify(self, name: str) -> None:
        """Compare a file with its digest, where one is recorded.

        Raises:
            BundleCorruptError: The file is missing, cannot be read, or holds other bytes; the message names it.
        """
        if (damage := self.damage(name)) is not None:
            raise BundleCorruptError(damage)

    def damage(self, name: str) -> str | None:
        """Return what is wrong with a file, or None."""
        path = self.path / name
        try:
            found = sha256_of_file(path) if name in self.digests else None
        except FileNotFoundError:
            return f"{path}: file is missing; restore it or train again"
        except OSError as error:
            return f"{path}: cannot be read: {error.strerror}"
        if found != self.digests.get(name):
            return f"{path}: contents do not match the sha256 in {CARD_FILE}; restore it or train again"
        return None


def digests_to_fields(digests: Mapping[str, str]) -> dict[str, Any]:
    """Return the section ``files`` of a card."""
    return {name: {"sha256": digest} for name, digest in digests.items()}


def _digests(document: Document) -> dict[str, str]:
    """Read the section ``files``; a name may not lead out of the run's folder."""
    for name in document.fields:
        if name in ("", ".", "..") or {"/", "\\", "\0"} & set(name):
            raise BundleCorruptError(f"{document.source}: '{name}' is not the name of a file in the run")
    digests = {name: document.nested(name).take("sha256", str) for name in document.fields}
    if TENSOR_FILE not in digests:
        raise BundleCorruptError(f"{document.source}: {TENSOR_FILE} is missing")
    return digests
