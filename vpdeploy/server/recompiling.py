"""Runs that clients send: compiled by the command line's own verb, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import vpdeploy.errors
from vpdeploy.errors import (
    BundleError,
    ExportError,
    InputError,
    MissingExtraError,
    QueueFullError,
    StorageFullError,
    VpdeployError,
)
from vpdeploy.files import describe_error, storage_reason, write_atomically
from vpdeploy.format.bundle import Bundle
from vpdeploy.format.document import to_json
from vpdeploy.format.manifest import MANIFEST_FILE
from vpdeploy.format.promptset import CompiledPromptSet

_TIMEOUT_S = 600
"""How long compiling one run may take, in s."""

_FORGOTTEN = ("VPDEPLOY_TOKEN", "VPDEPLOY_ADMIN_TOKEN", "VPDEPLOY_SERVE_")
"""How the names of variables begin that may hold what is the server's."""


class RunCompiler:
    """Compiles one run at a time. This process never loads torch, and a run that breaks the compiler breaks no server.

    The run is added to a copy of the bundle without its tasks, where the parity gate compares it in the same graph.

    Args:
        weights: The backbone's weights for runs that do not bring them; None for those that timm has on this machine.
    """

    def __init__(self, weights: Path | None = None) -> None:
        self._weights = weights
        self._busy = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def compile(self, bundle: Bundle, files: Mapping[str, bytes]) -> CompiledPromptSet:
        """Return a run as a prompt set of a bundle.

        Args:
            bundle: The bundle whose graph it is for.
            files: The run's files by name.

        Raises:
            MissingExtraError: This installation cannot compile runs.
            QueueFullError: Another run is being compiled.
            VpdeployError: What compiling it raises.
        """
        if not self._busy.acquire(blocking=False):
            raise QueueFullError("another run is being compiled; try again later")
        try:
            with tempfile.TemporaryDirectory(prefix="vpdeploy-") as scratch:
                return self._compile_in(Path(scratch), bundle, files)
        except OSError as error:
            kind = BundleError if (full := storage_reason(error)) is None else StorageFullError
            raise kind(f"the run cannot be compiled: {full or describe_error(error)}; nothing was changed") from error
        finally:
            self._busy.release()

    def close(self) -> None:
        """End what is being compiled: its request fails."""
        process = self._process
        if process is not None:
            process.kill()

    def _compile_in(self, scratch: Path, bundle: Bundle, files: Mapping[str, bytes]) -> CompiledPromptSet:
        run, copy = scratch / "run", scratch / "zoo"
        run.mkdir()
        copy.mkdir()
        for name, content in files.items():
            (run / name).write_bytes(_without_places(content, files) if name == "task.json" else content)
        data = bundle.manifest.graph_data
        for name in (bundle.manifest.graph_file, *([data.name] if data is not None else [])):
            (copy / name).symlink_to((bundle.path / name).resolve())
        fields = replace(bundle.manifest, tasks={}).to_fields()
        write_atomically(copy / MANIFEST_FILE, to_json(fields).encode())
        task = self._add(copy, run)
        return Bundle.open(copy).read_task(task)

    def _add(self, copy: Path, run: Path) -> str:
        """Let the command line add the run to the copy; returns the task's name."""
        command = [sys.executable, "-m", "vpdeploy", "task", "add", str(copy), str(run), "--json", "--threads", "1"]
        if self._weights is not None:
            command += ["--weights", str(self._weights)]
        # A run must not make this machine fetch anything, nor see what is the server's.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_FORGOTTEN)}
        environment["HF_HUB_OFFLINE"] = "1"
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        ) as process:
            self._process = process
            try:
                stdout, stderr = process.communicate(timeout=_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                raise ExportError(f"compiling the run took more than {_TIMEOUT_S} s; export it elsewhere") from None
            finally:
                self._process = None
                process.kill()
        try:
            fields = json.loads(stdout)
        except ValueError:
            fields = {}
        if process.returncode == 0 and isinstance(fields.get("task"), str):
            return str(fields["task"])
        raise _failure(fields, stderr, run.parent)


def _failure(fields: Mapping[str, object], stderr: str, scratch: Path) -> VpdeployError:
    """Return the error that the command line told, without the places of its files."""
    told = fields.get("error")
    kind, message = "", ""
    if isinstance(told, dict):
        kind, message = str(told.get("kind")), str(told.get("message")).replace(f"{scratch}{os.sep}", "")
    error = getattr(vpdeploy.errors, kind, None)
    if kind == MissingExtraError.__name__ or "No such command" in message:
        return MissingExtraError("torch", "export")
    if isinstance(error, type) and issubclass(error, BundleError):  # the run's, for the copy is sound
        return InputError(message)
    if isinstance(error, type) and issubclass(error, VpdeployError):
        return error(message)
    last = stderr.strip().splitlines()[-1:] or ["it said nothing"]
    return ExportError(f"compiling the run failed: {last[0][:200]}")


def _without_places(card: bytes, files: Mapping[str, bytes]) -> bytes:
    """Return a run's card without data and weights that lie elsewhere: a client names no file of this machine."""
    try:
        fields = json.loads(card)
        if isinstance(fields.get("data"), dict):
            fields["data"]["spec"] = None
        if fields.get("weights") not in (None, *files):
            fields["weights"] = None
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise InputError("the run's task.json is not a JSON object; pack it again") from None
    return json.dumps(fields).encode()
