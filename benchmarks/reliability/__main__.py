"""Attack a server that is started for each attack: ``python -m benchmarks.reliability ZOO [ATTACK ...]``.

Prints what the process's memory rose to, how long ``/v2/health/live`` and a bystander's own requests took meanwhile,
and what the attackers were answered. ``--source DIR`` serves with another checkout, to compare.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

from benchmarks.reliability.attacks import ATTACKS, bystander_image

_PROBE_PAUSE_S = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("attacks", nargs="*", help=f"of {', '.join(ATTACKS)}; all if none is named")
    parser.add_argument("--source", type=Path, default=Path(__file__).parents[2])
    parser.add_argument("--seconds", type=float, default=8.0)
    options = parser.parse_args()
    print(f"{'attack':<10} {'RSS MiB':>14} {'health p50/p99 ms':>20} {'others p50 ms (x)':>20} {'log':>6}  answers")
    for name in options.attacks or list(ATTACKS):
        with _serving(options.zoo, options.source) as (process, address, log):
            tasks = [each["task"] for each in json.loads(_get(address, "/v1/tasks"))["tasks"]]
            quiet = _probe(address, tasks[1:], 2.0)
            memory = _Memory(process.pid)
            attackers = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.reliability.attacks", name, address, tasks[0], str(options.seconds)],
                stdout=subprocess.PIPE,
                text=True,
            )
            time.sleep(0.5)
            busy = _probe(address, tasks[1:], options.seconds - 0.5)
            answers, _ = attackers.communicate(timeout=120)
            memory.stop()
        _report(name, memory, quiet, busy, log, answers)


def _report(
    name: str, memory: _Memory, quiet: dict[str, list[float]], busy: dict[str, list[float]], log: Path, answers: str
) -> None:
    health = sorted(busy["health"])
    usual, now = (sorted(each["task"] or [float("nan")])[len(each["task"]) // 2] for each in (quiet, busy))
    lines = len(log.read_text().splitlines())
    print(
        f"{name:<10} {memory.first_mib:>6.0f}→{memory.most_mib:<7.0f}"
        f" {health[len(health) // 2] * 1e3:>8.1f}/{health[int(len(health) * 0.99)] * 1e3:<11.1f}"
        f" {usual * 1e3:>6.1f}→{now * 1e3:<6.1f}({now / usual:.1f}) {lines:>6}  {answers.strip()}"
        + "".join(f"; others {status}: {count}" for status, count in Counter(busy["refused"]).items())
    )


@contextlib.contextmanager
def _serving(zoo: Path, source: Path) -> Iterator[tuple[subprocess.Popen[str], str, Path]]:
    log = Path(f"/tmp/vpdeploy-attack-{os.getpid()}.log")
    with log.open("w") as errors:
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from vpdeploy.cli.main import main; main()",
                "serve",
                str(zoo.resolve()),
                "--port",
                "0",
            ],
            cwd=source,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(str(source / each) for each in ("", "train", "export"))},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        assert process.stdout is not None
        found = re.search(r"http://(\S+)", process.stdout.readline())
        if found is None:
            raise SystemExit(log.read_text())
        yield process, found[1], log
    finally:
        process.kill()
        process.wait()


class _Memory:
    """The largest resident memory of a process, in MiB."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self.first_mib = self.most_mib = self._read()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _read(self) -> float:
        return int(re.search(r"VmRSS:\s+(\d+)", self._status.read_text())[1]) / 1024  # type: ignore[index]

    def _watch(self) -> None:
        while not self._stopped.wait(0.02):
            self.most_mib = max(self.most_mib, self._read())


def _get(address: str, path: str) -> bytes:
    connection = HTTPConnection(address, timeout=60)
    connection.request("GET", path)
    return connection.getresponse().read()


def _probe(address: str, tasks: list[str], seconds: float) -> dict[str, list[float]]:
    """Ask for health and for one image after another, each on a connection of its own."""
    found: dict[str, list[float]] = {"health": [], "task": [], "refused": []}
    until = time.perf_counter() + seconds

    def ask(kind: str) -> None:
        connection = HTTPConnection(address, timeout=120, source_address=("127.0.0.2", 0))  # not the attackers'
        turn = 0
        while time.perf_counter() < until:
            started = time.perf_counter()
            if kind == "health":
                connection.request("GET", "/v2/health/live")
            else:
                connection.request("POST", f"/v1/tasks/{tasks[turn % len(tasks)]}:predict", body=bystander_image())
            answer = connection.getresponse()
            answer.read()
            turn += 1
            if answer.status == 200:
                found[kind].append(time.perf_counter() - started)
            else:
                found["refused"].append(answer.status)
            time.sleep(_PROBE_PAUSE_S)

    threads = [threading.Thread(target=ask, args=(kind,)) for kind in ("health", "task")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


if __name__ == "__main__":
    main()
