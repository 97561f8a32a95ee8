"""Swap tasks under load, or send what is malformed, for long: ``python -m benchmarks.reliability.endurance KIND ZOO``.

``swaps`` publishes, withdraws and publishes anew tasks of a copy of ZOO while clients ask it. Each version of a task
names other classes, so every answer shows which version gave it; afterwards all are held against what was published.
``malformed`` sends requests of which a few bytes are wrong. Both print what failed, and the server's memory,
descriptors and threads at the beginning and the end.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path

import numpy as np

from benchmarks.reliability.attacks import bystander_image
from vpdeploy.format.bundle import Bundle, publish_task, withdraw_task
from vpdeploy.format.promptset import CompiledPromptSet

_SERVER = """
import sys
from pathlib import Path
import vpdeploy
from vpdeploy.server.app import create_app
from vpdeploy.server.logs import configure_logs
from vpdeploy.server.run import address_of, bind_socket, run_server
from vpdeploy.server.settings import ServerSettings

zoo = Path(sys.argv[1])
configure_logs("text")
with bind_socket("127.0.0.1", 0) as listener, vpdeploy.load(zoo) as session:
    app = create_app(session, ServerSettings(watch=zoo, watch_interval_s=0.02, lame_duck_s=0))
    run_server(app, listener, on_listening=lambda: print(address_of(listener), flush=True))
"""

_STEADY = tuple(f"steady-{number}" for number in range(2))
"""Tasks that are replaced and never withdrawn: none of their requests may fail."""

_MOVING = tuple(f"moving-{number}" for number in range(8))
"""Tasks that are withdrawn and published anew, and may be unknown meanwhile."""

_SWAPS_BEFORE = 200
"""Swaps before the first look at memory: by then the table has its size."""


class ServedCopy:
    """A server of a copy of a bundle, in a process of its own."""

    def __init__(self, zoo: Path, log: Path) -> None:
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _SERVER, str(zoo)], stdout=subprocess.PIPE, stderr=errors, text=True
            )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        if not self.address:
            raise SystemExit(log.read_text())
        self.zoo = zoo
        self.log = log

    def usage(self) -> str:
        """Return memory, descriptors and threads of the process."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        rss, threads = (int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("VmRSS", "Threads"))  # type: ignore[index]
        descriptors = len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))
        return f"{rss / 1024:.0f} MiB, {descriptors} descriptors, {threads} threads"


@contextlib.contextmanager
def _serving(zoo: Path) -> Iterator[ServedCopy]:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "zoo"
        shutil.copytree(zoo, copy)
        model = Bundle.open(copy).read_task(next(iter(Bundle.open(copy).manifest.tasks)))
        for name in (*_STEADY, *_MOVING):
            publish_task(copy, _generation(model, name, 0))
        server = ServedCopy(copy, Path(folder) / "log")
        try:
            yield server
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(60)
        finally:
            server.process.kill()
            server.process.wait()
            print(f"exit code {server.process.returncode}; the log's end:")
            for line in [each for each in server.log.read_text().splitlines() if " INFO " not in each][-3:]:
                print(f"  {line[:200]}")


def _generation(model: CompiledPromptSet, name: str, generation: int) -> CompiledPromptSet:
    """Return a task whose classes name its generation."""
    count = len(model.card.labels)
    labels = tuple(f"{generation}-{index}" for index in range(count))
    bias = np.zeros(count, np.float32)
    bias[generation % count] = 1000.0
    card = replace(model.card, name=name, labels=labels)
    return replace(model, card=card, tensors={**model.tensors, "head_bias": bias})


class Clients:
    """Threads that ask one task after the other, and what they were answered."""

    def __init__(self, server: ServedCopy, count: int) -> None:
        self.statuses: Counter[str] = Counter()
        self.seen: set[tuple[str, int, str]] = set()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(server, seed)) for seed in range(count)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ask no more."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, server: ServedCopy, seed: int) -> None:
        rng, image = random.Random(seed), bystander_image()
        connection = HTTPConnection(server.address, timeout=60)
        while not self._stop.is_set():
            name = rng.choice((*_STEADY, *_MOVING))
            try:
                connection.request("POST", f"/v1/tasks/{name}:predict?top=1", body=image)
                answer = connection.getresponse()
                body = json.loads(answer.read())
            except (OSError, ValueError) as error:
                self.statuses[f"{name.partition('-')[0]} {type(error).__name__}"] += 1
                connection = HTTPConnection(server.address, timeout=60)
                continue
            self.statuses[f"{name.partition('-')[0]} {answer.status}"] += 1
            if answer.status == 200:
                self.seen.add((body["task"], body["version"], body["predictions"][0]["label"]))


def swaps(zoo: Path, *, count: int, seconds: float, every_s: float, clients: int) -> None:
    """Swap tasks under load."""
    with _serving(zoo) as server:
        model = Bundle.open(server.zoo).read_task(_STEADY[0])
        manifest = Bundle.open(server.zoo).manifest
        published = {(name, manifest.tasks[name].version): 0 for name in (*_STEADY, *_MOVING)}
        rng, kinds = random.Random(0), Counter[str]()
        asking = Clients(server, clients)
        began, first, usage = time.monotonic(), "", server.usage()
        present = {*_STEADY, *_MOVING}
        for generation in itertools.count(1):
            swapped = sum(kinds.values())
            if swapped >= count or time.monotonic() - began > seconds:
                break
            if swapped == _SWAPS_BEFORE:
                first = server.usage()
            name = rng.choice(_STEADY) if rng.random() < 0.05 else rng.choice(_MOVING)
            if name in present and name in _MOVING and rng.random() < 0.4:
                withdraw_task(server.zoo, name)
                present.remove(name)
                kinds["withdrawn"] += 1
            else:
                version = publish_task(server.zoo, _generation(model, name, generation))
                published[name, version] = generation
                kinds["replaced" if name in present else "published anew"] += 1
                present.add(name)
            if swapped % 2000 == 1999:
                print(f"  {time.monotonic() - began:.0f} s, {swapped + 1} swaps: {server.usage()}", flush=True)
            time.sleep(every_s)
        asking.stop()
        took = time.monotonic() - began
        wrong = [
            (task, version, label)
            for task, version, label in asking.seen
            if not _is_right(published, task, version, label, len(model.card.labels))
        ]
        answers = sum(asking.statuses.values())
        versions = len(asking.seen)
        failed = {
            kind: n for kind, n in asking.statuses.items() if kind not in ("steady 200", "moving 200", "moving 404")
        }
        print(f"{sum(kinds.values())} swaps ({dict(kinds)}) in {took:.0f} s under {clients} clients")
        print(f"{answers} answers ({answers / took:.0f}/s) by {versions} versions: {dict(asking.statuses)}")
        print(f"failed: {failed or 0}; wrong: {wrong[:5] or 0}")
        print(f"server: {usage} -> {first} after {_SWAPS_BEFORE} swaps -> {server.usage()}")


def _is_right(published: dict[tuple[str, int], int], task: str, version: int, label: str, classes: int) -> bool:
    generation = published.get((task, version))
    return generation is not None and label == f"{generation}-{generation % classes}"


def _whole_requests(task: str) -> list[bytes]:
    """Return requests that are well-formed, or nearly."""
    image = bystander_image()[:3000]
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": ["AAAA"]}
    bodies = [
        (f"/v1/tasks/{task}:predict?top=2", "image/jpeg", image),
        ("/v1/predict?tasks=" + task, "image/jpeg", image),
        (
            f"/v1/tasks/{task}:predict",
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
            + image[:500]
            + b"\r\n--x--\r\n",
        ),
        (f"/v2/models/{task}/infer", "application/json", json.dumps({"inputs": [tensor], "id": "7"}).encode()),
        (
            f"/v2/models/{task}/infer",
            "application/json",
            json.dumps({"inputs": [{**tensor, "datatype": "UINT8", "shape": [1, 2, 2, 3], "data": [0] * 12}]}).encode(),
        ),
        ("/v2/repository/index", "application/json", b"{}"),
    ]
    posts = [
        f"POST {path} HTTP/1.1\r\nHost: [::1]\r\nContent-Length: {len(body)}\r\nContent-Type: {kind}\r\n\r\n".encode()
        + body
        for path, kind, body in bodies
    ]
    return [
        *posts,
        f"GET /v2/models/{task}/config HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(),
        b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ]


def _damaged(data: bytes, rng: random.Random) -> bytes:
    """Change, remove, repeat or insert a few bytes, most of them in the head or just behind it."""
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(min(len(data), rng.choice((60, 200, 400, len(data)))))
        length = rng.choice((1, 1, 2, 8, 40))
        kind = rng.randrange(5)
        if kind == 0:
            data = data[:place] + rng.randbytes(length) + data[place + length :]
        elif kind == 1:
            data = data[:place] + data[place + length :]
        elif kind == 2:
            data = data[: place + length] + data[place:]
        elif kind == 3:
            data = (
                data[:place]
                + rng.choice((b"\r\n", b"\0", b"{", b"]", b"-1", b"1e999", b": ", b"%", b"\xff"))
                + data[place:]
            )
        else:
            data = data[: max(1, place)]
        if not data:
            return b"\0"
    return data


def malformed(zoo: Path, *, count: int, seconds: float, clients: int) -> None:
    """Send damaged requests."""
    with _serving(zoo) as server:
        host, port = server.address.split(":")
        whole, statuses, numbers = _whole_requests(_STEADY[0]), Counter[str](), itertools.count()
        began, usage = time.monotonic(), server.usage()

        def send(seed: int) -> None:
            rng = random.Random(seed)
            while next(numbers) < count and time.monotonic() - began < seconds:
                with socket.create_connection((host, int(port)), timeout=60) as connection:
                    try:
                        connection.sendall(_damaged(rng.choice(whole), rng))
                        connection.shutdown(socket.SHUT_WR)
                        statuses[connection.recv(64)[9:12].decode(errors="replace") or "closed"] += 1
                    except OSError as error:
                        statuses[type(error).__name__] += 1

        threads = [threading.Thread(target=send, args=(seed,)) for seed in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.monotonic() - began
        print(f"{sum(statuses.values())} damaged requests in {took:.0f} s: {dict(sorted(statuses.items()))}")
        asking = Clients(server, 2)
        time.sleep(1)
        asking.stop()
        print(f"afterwards: {dict(asking.statuses)}; server: {usage} -> {server.usage()}")


def main() -> None:
    """Run one kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    kinds: dict[str, Callable[..., None]] = {"swaps": swaps, "malformed": malformed}
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--count", type=int, default=10_000, help="how many swaps, or requests, at most")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long at most")
    parser.add_argument("--every-s", type=float, default=0.0, help="pause between two swaps")
    parser.add_argument("--clients", type=int, default=8)
    options = vars(parser.parse_args())
    kind = options.pop("kind")
    if kind == "malformed":
        del options["every_s"]
    kinds[kind](**options)


if __name__ == "__main__":
    main()
