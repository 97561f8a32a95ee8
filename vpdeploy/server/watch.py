"""Following a bundle on disk: a task that is published there is served without a restart."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path

from vpdeploy.errors import VpdeployError
from vpdeploy.format.manifest import MANIFEST_FILE
from vpdeploy.server.service import ServedSession
from vpdeploy.session.session import SyncReport

_log = logging.getLogger(__name__)

_Signature = tuple[int, int, int]


class BundleWatcher:
    """Brings a session in line with its bundle whenever the manifest was replaced.

    Args:
        session: The session to synchronise; that is done in a thread.
        folder: The bundle's folder.
        interval_s: How often the manifest is looked at, in seconds.
    """

    def __init__(self, session: ServedSession, folder: Path, *, interval_s: float) -> None:
        self._session = session
        self._manifest = folder / MANIFEST_FILE
        self._interval_s = interval_s
        self._seen: _Signature | None = None
        self._complaint = ""
        self._failed = session.failures  # whoever made the watcher has told of these

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            await asyncio.to_thread(self.check)
            await asyncio.sleep(self._interval_s)

    def check(self) -> None:
        """Look once, and synchronise if the manifest is not the one seen last.

        A bundle that cannot be read is complained about once and tried again at every look; what is loaded stays. So
        is a task that is damaged, beside which the others are followed.
        """
        try:
            signature = _signature(self._manifest)
            if signature == self._seen:
                return
            report = self._session.sync()
        except (VpdeployError, OSError) as error:
            complaint = " ".join(str(error).split())
            if complaint != self._complaint:
                _log.error("the bundle cannot be followed, serving what is loaded: %s", complaint)
            self._complaint = complaint
            return
        self._seen, self._complaint = None if report.failed else signature, ""
        _log_changes(report)
        log_failures({name: reason for name, reason in report.failed.items() if self._failed.get(name) != reason})
        self._failed = report.failed


def log_failures(failures: Mapping[str, str]) -> None:
    """Log what is wrong with tasks that could not be loaded, by name: one line each."""
    for name, reason in failures.items():
        _log.error("task '%s' cannot be loaded, the others are served: %s", name, " ".join(reason.split()))


def _signature(path: Path) -> _Signature:
    status = path.stat()
    return status.st_mtime_ns, status.st_ino, status.st_size


def _log_changes(report: SyncReport) -> None:
    for what, names in (("added", report.added), ("updated", report.updated), ("removed", report.removed)):
        if names:
            _log.info("tasks %s: %s", what, ", ".join(names))
