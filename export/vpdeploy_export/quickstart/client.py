"""The quickstart's server, and a client that asks it with the standard library alone."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from vpdeploy.errors import BackendError

_ADDRESS = re.compile(r"http://\S+")
_START_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class ServedAnswer:
    """What the server said about one image.

    Attributes:
        task: The task asked.
        label: Its most probable class.
        latency_ms: From request to answer, over HTTP.
    """

    task: str
    label: str
    latency_ms: float


@contextlib.contextmanager
def serving(bundle: Path) -> Iterator[str]:
    """Run ``vpdeploy serve`` on a free port and yield its address; it is stopped gracefully at the end.

    Raises:
        BackendError: The server does not start.
    """
    command = [sys.executable, "-m", "vpdeploy", "serve", str(bundle), "--port", "0", "--max-delay-ms", "50"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watchdog = threading.Timer(_START_SECONDS, process.kill)
    watchdog.start()
    try:
        line = _readable(process.stdout).readline()
        watchdog.cancel()
        found = _ADDRESS.search(line)
        if found is None:
            process.kill()
            reason = " ".join(_readable(process.stderr).read().split())[-300:]
            raise BackendError(f"the server did not start: {reason or 'no answer'}")
        # Read on, or a full pipe would stop the server.
        threading.Thread(target=_readable(process.stderr).read, daemon=True).start()
        yield found.group()
    finally:
        watchdog.cancel()
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        process.wait()
        _readable(process.stdout).close()


def ask_together(address: str, questions: Sequence[tuple[str, bytes]]) -> list[ServedAnswer]:
    """Send images of different tasks at the same moment, so that the server mixes them in a batch.

    Args:
        address: Of the server.
        questions: Task and encoded image, one for each request.

    Raises:
        BackendError: A request fails.
    """
    gate = threading.Barrier(len(questions))

    def ask(question: tuple[str, bytes]) -> ServedAnswer:
        task, image = question
        url = f"{address}/v1/tasks/{task}:predict?top=1"
        request = urllib.request.Request(url, data=image, headers={"Content-Type": "image/png"})
        gate.wait()
        started = time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                body = json.load(response)
        except urllib.error.URLError as error:
            raise BackendError(f"{url}: {error}") from error
        elapsed = (time.perf_counter() - started) * 1000
        return ServedAnswer(task=task, label=body["predictions"][0]["label"], latency_ms=elapsed)

    with ThreadPoolExecutor(len(questions)) as pool:
        return list(pool.map(ask, questions))


def _readable(stream: IO[str] | None) -> IO[str]:
    if stream is None:
        raise RuntimeError("the server was started without a pipe")
    return stream
