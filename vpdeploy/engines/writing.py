"""Engines are written so that a reader finds a whole one or none, and removed when no graph beside them needs them."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from pathlib import Path

from vpdeploy.artifact import Artifact
from vpdeploy.document import to_json
from vpdeploy.engines.card import EngineCard
from vpdeploy.engines.store import CARD_SUFFIX, ENGINE_SUFFIX, FoundEngine, list_engines
from vpdeploy.errors import BuildError
from vpdeploy.files import locked, replacing_file, sha256_of_file

_LOCK_FILE = ".lock"


def write_engine(folder: Path, data: memoryview, card: EngineCard) -> FoundEngine:
    """Write an engine and its sidecar; both are on the disk before the first takes its place, the sidecar last.

    Raises:
        BuildError: The folder cannot be written, or the disk is full; what was there is as it was.
    """
    path = folder / f"{card.key}{ENGINE_SUFFIX}"
    try:
        with locked(folder / _LOCK_FILE):
            _remove(folder.glob(".*.partial"))  # left by a killed process: who writes holds the lock
            with replacing_file(folder / f"{card.key}{CARD_SUFFIX}") as sidecar:
                sidecar.write_text(to_json(card.to_fields()), encoding="utf-8")
                with replacing_file(path) as engine:
                    engine.write_bytes(data)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else error.strerror or str(error)
        raise BuildError(
            f"{folder}: the engine ({len(data) / 1e6:.0f} MB) cannot be written, {reason}; free some space and run the "
            "command again, what was there is as it was"
        ) from error
    return FoundEngine(path=path, card=card)


def leftover_engines(artifact: Artifact) -> list[Path]:
    """Return the engines of graphs that are no longer beside them, and engines without a usable sidecar.

    An engine of another ONNX file in the same folder is none of them.
    """
    listed = list_engines(artifact)
    foreign = any(isinstance(card, str) or card.graph_sha256 != artifact.sha256 for _, card in listed)
    if not foreign:
        return []
    beside = [path for path in artifact.graph_path.parent.glob("*.onnx") if path != artifact.graph_path]
    present = {artifact.sha256, *map(sha256_of_file, beside)}
    return [path for path, card in listed if isinstance(card, str) or card.graph_sha256 not in present]


def remove_engines(paths: Iterable[Path]) -> None:
    """Remove engines and what lies beside each under its name, the sidecar first.

    Raises:
        OSError: A file cannot be removed.
    """
    for path in paths:
        with locked(path.parent / _LOCK_FILE):
            _remove([path.with_name(f"{path.stem}{CARD_SUFFIX}"), *path.parent.glob(f"{path.stem}.*")])


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
