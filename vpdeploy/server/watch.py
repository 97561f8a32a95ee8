"""Following a bundle on disk: a task that is published there is served without a restart."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from vpdeploy.errors import VpdeployError
from vpdeploy.format.manifest import MANIFEST_FILE
from vpdeploy.session.session import SyncReport

_log = logging.getLogger(__name__)

_Signature = tuple[int, int, int]


class BundleWatcher:
    """Brings a session in line with its bundle whenever the manifest was replaced, on a thread of its own.

    Args:
        sync: Brings the session in line; called on the watcher's thread.
        folder: The bundle's folder.
        interval_s: How often the manifest is looked at, in s.
        on_failure: Called each time that following the bundle, or a task of it, failed.
        told: Tasks that could not be loaded before, and why; whoever made the watcher has told of them.
    """

    def __init__(
        self,
        sync: Callable[[], SyncReport],
        folder: Path,
        *,
        interval_s: float,
        on_failure: Callable[[], None] = lambda: None,
        told: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._sync = sync
        self._manifest = folder / MANIFEST_FILE
        self._interval_s = interval_s
        self._on_failure = on_failure
        self._told = told
        self._seen: _Signature | None = None
        self._complaint = ""
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="vpdeploy-watcher", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def close(self, *, timeout_s: float | None = None) -> bool:
        """Watch no longer.

        Args:
            timeout_s: How long to wait for a look that is under way, in s; None for as long as it takes.

        Returns:
            Whether the thread has ended. The session must not be closed while it loads a task.
        """
        self._ending.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def check(self) -> None:
        """Look once, and synchronise if the manifest is not the one seen last.

        Whatever goes wrong is complained about once and tried again at every look; what is loaded stays. So is a task
        that is damaged, beside which the others are followed.
        """
        try:
            signature = _signature(self._manifest)
            if signature == self._seen:
                return
            report = self._sync()
        except (VpdeployError, OSError) as error:
            self._complain(" ".join(str(error).split()))
        except Exception as error:  # following must not end, whatever a bundle holds
            self._complain(f"unexpectedly, {type(error).__name__}: {error}", unexpected=error)
        else:
            self._seen, self._complaint = None if report.failed else signature, ""
            _log_changes(report)
            self._tell_failures(report.failed)

    def _watch(self) -> None:
        while not self._ending.is_set():
            self.check()
            self._ending.wait(self._interval_s)

    def _tell_failures(self, failed: Mapping[str, str]) -> None:
        if failed:
            self._on_failure()
        log_failures({name: reason for name, reason in failed.items() if self._told.get(name) != reason})
        self._told = failed

    def _complain(self, complaint: str, *, unexpected: Exception | None = None) -> None:
        self._on_failure()
        if complaint != self._complaint:
            _log.error("the bundle cannot be followed, serving what is loaded: %s", complaint, exc_info=unexpected)
        self._complaint = complaint


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
