"""What a measurement of batch sizes found, kept beside the graph so that the next start need not measure."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpdeploy.errors import BundleCorruptError
from vpdeploy.files import describe_error, write_atomically
from vpdeploy.format.document import Document, to_json
from vpdeploy.machine import describe_machine
from vpdeploy.session.session import Session

_log = logging.getLogger(__name__)

SUFFIX = ".batch-size"


@dataclass(frozen=True, kw_only=True)
class NotedSizes:
    """A measurement.

    Attributes:
        images_per_s: Images per second by batch size, one at least.
        tried_all: Whether larger sizes were tried or ruled out, not given up for want of time.
    """

    images_per_s: Mapping[int, float]
    tried_all: bool


class BatchSizeCache:
    """The file of one graph, runtime and machine: ``engines/KEY.batch-size``, JSON.

    Args:
        folder: Where it lies.
        facts: What a measurement holds for; any other value is another file.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self._facts = dict(facts)
        key = hashlib.sha256(json.dumps(self._facts, sort_keys=True).encode()).hexdigest()
        self.path = folder / f"{key[:16]}{SUFFIX}"

    @classmethod
    def of(cls, session: Session) -> BatchSizeCache:
        """Return the file for a session's graph, runtime, threads and machine."""
        artifact, runtime, machine = session.artifact, session.describe().runtime, describe_machine()
        return cls(
            artifact.engines_folder,
            {
                "graph_sha256": artifact.sha256,
                "runtime": runtime.name,
                "runtime_version": runtime.version,
                "threads": runtime.threads,
                "engine": None if runtime.engine is None else runtime.engine.file,
                "cpu": machine.cpu,
                "cores": machine.cores,
                "gpu": None if machine.gpu is None else machine.gpu.name,
            },
        )

    def read(self) -> NotedSizes | None:
        """Return what was measured; None where nothing was, or where the file is damaged, which the log tells."""
        if not self.path.is_file():
            return None
        try:
            document = Document.read(self.path)
            for name, value in self._facts.items():
                if document.fields.get(name) != value:
                    raise BundleCorruptError(f"{self.path}: field '{name}' is of another measurement")
            return NotedSizes(
                images_per_s=_rates(document.nested("images_per_s")), tried_all=document.take("tried_all", bool)
            )
        except (BundleCorruptError, OSError) as error:
            _log.warning("ignored, batch sizes are measured again: %s", error)
            return None

    def write(self, images_per_s: Mapping[int, float], *, tried_all: bool) -> None:
        """Note a measurement, whole or not at all; a folder that cannot be written costs the next start only."""
        fields = {
            **self._facts,
            "images_per_s": {str(size): rate for size, rate in images_per_s.items()},
            "tried_all": tried_all,
        }
        try:
            write_atomically(self.path, to_json(fields).encode())
        except OSError as error:
            _log.info("not noted, the next start measures batch sizes again: %s", describe_error(error))


def _rates(document: Document) -> dict[int, float]:
    rates: dict[int, float] = {}
    for name in document.fields:
        rate = document.take(name, float)
        if not (name.isascii() and name.isdecimal() and len(name) <= 6 and int(name) > 0 and rate > 0):
            raise BundleCorruptError(f"{document.source}: expected images/s by batch size, found '{name[:40]}'")
        rates[int(name)] = rate
    if not rates:
        raise BundleCorruptError(f"{document.source}: names no batch size")
    return rates
