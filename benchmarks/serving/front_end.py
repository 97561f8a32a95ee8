"""What the front end costs: requests a second of one core's time, of this checkout and of another, in turns.

    python -m benchmarks.serving.front_end --before ../old

The session answers at once, so all that the server's process takes is the front end. Counted is the process's CPU time,
which tells requests per core also where other programs use the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.serving.load import PAYLOADS, put_load

_INSTANT = Path(__file__).with_name("instant.py")
_TASKS = ("first", "second", "third")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="another checkout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--payloads", nargs="*", default=list(PAYLOADS))
    options = parser.parse_args()
    sources = {"after": Path(__file__).parents[2]} | ({"before": options.before} if options.before else {})
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(serving_instantly(source)) for name, source in sources.items()}
        for payload in options.payloads:
            rates: dict[str, list[float]] = {name: [] for name in servers}
            for number in range(options.rounds + 1):
                for name in list(servers)[:: 1 if number % 2 else -1]:
                    rate = _requests_per_core_second(*servers[name], payload, options.requests, options.connections)
                    if number:  # the first warms up
                        rates[name].append(rate)
            line = ", ".join(f"{name} {statistics.median(each):.0f}" for name, each in rates.items())
            if options.before:
                ratios = [new / old for new, old in zip(rates["after"], rates["before"], strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
                line += f"; after/before {middle:.2f} ({low:.2f}-{high:.2f})"
            print(f"{payload}: requests per second of CPU time: {line}", flush=True)


@contextlib.contextmanager
def serving_instantly(source: Path) -> Iterator[tuple[int, str]]:
    """Start the server of a checkout; yields its process id and address."""
    process = subprocess.Popen(
        [sys.executable, str(_INSTANT)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(source.resolve() / each) for each in ("", "train", "export")),
        },
        cwd=source,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process.pid, process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait(30)


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used, in s; Linux only."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _requests_per_core_second(pid: int, address: str, payload: str, requests: int, connections: int) -> float:
    before = cpu_seconds(pid)
    result = put_load(address, PAYLOADS[payload](), _TASKS, connections=connections, seconds=120, requests=requests)
    return result.answers / (cpu_seconds(pid) - before)


if __name__ == "__main__":
    main()
