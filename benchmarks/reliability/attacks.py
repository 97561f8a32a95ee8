"""The attackers, in one process: `python -m benchmarks.reliability.attacks ATTACK HOST:PORT TASK SECONDS`."""

from __future__ import annotations

import functools
import gzip
import io
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
from PIL import Image

_MIB = 1 << 20


def _encoded(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


@functools.cache
def bystander_image() -> bytes:
    """A photograph of ordinary size: what the others send."""
    rng = np.random.default_rng(0)
    return _encoded(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8), "JPEG", quality=80)


def _big_jpeg() -> bytes:
    down, right = np.mgrid[0:2400, 0:3200]
    pixels = np.stack([(down * 3 + right * k) % 256 for k in (1, 2, 5)], axis=-1).astype(np.uint8)
    return _encoded(pixels, "JPEG", quality=90)


def _big_png() -> bytes:
    down, right = np.mgrid[0:1200, 0:1600]
    pixels = np.stack([(down * right * k) % 251 for k in (1, 2, 5)], axis=-1).astype(np.uint8)
    return _encoded(pixels, "PNG", compress_level=1)


def _deep_png() -> bytes:
    return _encoded(np.zeros((8000, 8000), np.uint16), "PNG")


def _scans() -> bytes:
    """A progressive JPEG with its last scan repeated, as often as 1 MiB allows."""
    data = _encoded(np.zeros((4000, 4000, 3), np.uint8), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * min(2000, _MIB // len(scan)) + data[-2:]


def _form() -> bytes:
    part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    return part + b"\r\n--" * (60 * _MIB // 4) + b"\r\n--x--\r\n"


def _post(task: str, body: bytes, *, oip: bool = False, headers: str = "", send: int | None = None) -> bytes:
    path = f"/v2/models/{task}/infer" if oip else f"/v1/tasks/{task}:predict"
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return head.encode() + body[:send]


Attack = tuple[int, Callable[[str], bytes]]
"""How many connections there are, and what each of them sends again and again."""

ATTACKS: dict[str, Attack] = {
    "usual": (8, lambda task: _post(task, bystander_image())),
    "flood": (64, lambda task: _post(task, _big_jpeg())),
    "pngs": (64, lambda task: _post(task, _big_png())),
    "gzip": (
        60,
        lambda task: _post(task, gzip.compress(bytes(64 * _MIB)), oip=True, headers="Content-Encoding: gzip\r\n"),
    ),
    "headers": (4, lambda task: b"GET /v2 HTTP/1.1\r\nX: " + b"a" * (100 * _MIB)),
    "many": (4, lambda task: b"GET /v2 HTTP/1.1\r\n" + b"X-Header: abcdefgh\r\n" * (_MIB * 4)),
    "deep": (4, lambda task: _post(task, _deep_png())),
    "scans": (4, lambda task: _post(task, _scans())),
    "json": (4, lambda task: _post(task, b'{"inputs":[' + b"[]," * (8_000_000 // 3) + b"[]]}", oip=True)),
    "numbers": (4, lambda task: _post(task, b'{"inputs":[' + b"255," * 1_990_000 + b"0]}", oip=True)),
    "form": (3, lambda task: _post(task, _form(), headers="Content-Type: multipart/form-data; boundary=x\r\n")),
    "stalled": (64, lambda task: _post(task, bytes(64 * _MIB), send=9 * _MIB)),
    "garbage": (8, lambda task: _post(task, b"GIF89a nonsense" + bytes(500))),
    "malformed": (8, lambda task: b"nonsense\r\n\r\n"),
}


def _answer(connection: socket.socket) -> str:
    """Read one whole answer and return its status."""
    head = b""
    while b"\r\n\r\n" not in head:
        if not (piece := connection.recv(65536)):
            return "closed"
        head += piece
    head, _, body = head.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    while len(body) < length and (piece := connection.recv(65536)):
        body += piece
    return head[9:12].decode()


def main() -> None:
    name, address, task, seconds = sys.argv[1:]
    connections, make = ATTACKS[name]
    payload = make(task)
    until = time.monotonic() + float(seconds)
    answers: Counter[str] = Counter()

    def attack() -> None:
        while time.monotonic() < until:
            try:
                with socket.create_connection(address.split(":"), timeout=30) as connection:
                    connection.settimeout(max(0.1, until - time.monotonic() + 20))
                    while time.monotonic() < until:
                        connection.sendall(payload)
                        status = _answer(connection)
                        answers[status] += 1
                        if status != "200":
                            break
            except OSError:
                answers["closed"] += 1

    threads = [threading.Thread(target=attack) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(", ".join(f"{status}: {count}" for status, count in sorted(answers.items())))


if __name__ == "__main__":
    main()
