"""How far a build is, and how it is stopped: TensorRT's ``IProgressMonitor``, and the thread that it is called in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

_T = TypeVar("_T")

_POLL_SECONDS = 0.1
_START_SECONDS = 1.0

OnProgress = Callable[[float, str], None]
"""Takes the finished share of the build, from 0 to 1 and never falling, and the name of what is being done."""


@dataclass(kw_only=True)
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class BuildProgress:
    """What the monitor was told. Phases nest: a phase's steps share the one step of its parent that is under way.

    Attributes:
        cancelled: The build ends after its present step.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phases: dict[str, _Phase] = {}
        self._share = 0.0
        self._title = ""
        self.cancelled = False

    def snapshot(self) -> tuple[float, str]:
        """Return the finished share, from 0 to 1, and the name of the innermost phase."""
        with self._lock:
            return self._share, self._title

    def cancel(self) -> None:
        """Let the build end after its present step."""
        self.cancelled = True

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """Note that a phase has begun."""
        with self._lock:
            self._phases[name] = _Phase(parent=parent, steps=max(1, steps))
            self._title = name

    def step(self, name: str, step: int) -> bool:
        """Note that a step is complete; return whether to go on."""
        with self._lock:
            if name in self._phases:
                self._phases[name].done = step + 1
                self._share = max(self._share, self._reached(name))
            return not self.cancelled

    def finish(self, name: str) -> None:
        """Note that a phase has ended."""
        with self._lock:
            phase = self._phases.pop(name, None)
            if phase is not None and phase.parent is None:
                self._share = 1.0
            elif phase is not None and phase.parent in self._phases:
                self._title = phase.parent

    def _reached(self, name: str) -> float:
        """Return the share of the whole build that is done when a phase is at its present step."""
        share = 0.0
        at: str | None = name
        while at is not None and at in self._phases:
            phase = self._phases[at]
            share = min(1.0, (phase.done + share) / phase.steps)
            at = phase.parent
        return share


def monitor_of(module: Any, progress: BuildProgress) -> Any:
    """Return an ``IProgressMonitor`` of a TensorRT module; TensorRT calls it from its own threads."""

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        """Passes everything on."""

        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            """Pass on."""
            progress.start(phase_name, parent_phase or None, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """Pass on; False ends the build."""
            return progress.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            """Pass on."""
            progress.finish(phase_name)

    return Monitor()


def interruptible(work: Callable[[], _T], progress: BuildProgress, on_progress: OnProgress | None) -> _T:
    """Run ``work`` in a thread of its own, so that signals and the progress bar are served meanwhile.

    All of NVIDIA's code runs there: a ``KeyboardInterrupt`` that arrives in one of its callbacks, a log message of the
    parser for one, would be swallowed by the library.
    """
    results: list[_T] = []
    errors: list[BaseException] = []
    # Not Thread.join: interrupted by a signal, it takes the thread for ended (CPython issue 90882, until 3.13).
    begun, ended = threading.Event(), threading.Event()

    def run() -> None:
        begun.set()
        try:
            if not progress.cancelled:
                results.append(work())
        except BaseException as error:  # raised again in the caller's thread
            errors.append(error)
        finally:
            ended.set()

    try:
        threading.Thread(target=run, name="vpdeploy-build", daemon=True).start()
        while not ended.wait(_POLL_SECONDS):
            if on_progress is not None:
                on_progress(*progress.snapshot())
        if on_progress is not None:
            on_progress(*progress.snapshot())
    except BaseException:
        progress.cancel()
        # A thread that has not begun by then was never started, or will find the build cancelled.
        if begun.wait(_START_SECONDS):
            ended.wait()
        raise
    if errors:
        raise errors[0]
    return results[0]
