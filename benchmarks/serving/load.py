"""A client that costs little: so many connections, each of which sends one request after another."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True, kw_only=True)
class Payload:
    """One kind of request; ``path`` holds ``{task}``."""

    path: str
    headers: dict[str, str]
    body: bytes


def jpeg_payload(side: int = 224) -> Payload:
    """A photograph-like JPEG of quality 90."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return Payload(path="/v1/tasks/{task}:predict", headers={"content-type": "image/jpeg"}, body=buffer.getvalue())


def uint8_payload(side: int = 224) -> Payload:
    """One image as a binary tensor of the Open Inference Protocol; the logits come back as binary, too."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), dtype=np.uint8).tobytes()
    text = json.dumps(
        {
            "inputs": [
                {
                    "name": "image",
                    "datatype": "UINT8",
                    "shape": [1, side, side, 3],
                    "parameters": {"binary_data_size": len(pixels)},
                }
            ],
            "outputs": [{"name": "logits", "parameters": {"binary_data": True}}],
        }
    ).encode()
    return Payload(
        path="/v2/models/{task}/infer",
        headers={"content-type": "application/octet-stream", "inference-header-content-length": str(len(text))},
        body=text + pixels,
    )


def pixels_payload(side: int = 224) -> Payload:
    """The pixels of one image as they are, for servers that people write by hand."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8).tobytes()
    return Payload(path="/v1/tasks/{task}:predict", headers={"content-type": "application/octet-stream"}, body=pixels)


def json_payload(payload: Payload) -> Payload:
    """The same image as base64 in JSON, which is how LitServe takes images."""
    fields = {"image": base64.b64encode(payload.body).decode(), "type": payload.headers["content-type"]}
    return Payload(path=payload.path, headers={"content-type": "application/json"}, body=json.dumps(fields).encode())


PAYLOADS = {"uint8": uint8_payload, "jpeg": jpeg_payload}


@dataclass(frozen=True, kw_only=True)
class LoadResult:
    """What came of a load: answers, seconds, and each answer's latency in s."""

    answers: int
    seconds: float
    latencies: list[float]


def put_load(
    address: str,
    payload: Payload,
    tasks: tuple[str, ...],
    *,
    connections: int,
    seconds: float,
    requests: int | None = None,
) -> LoadResult:
    """Send requests until time is up, or until so many were answered; every answer must be a 200.

    Raises:
        RuntimeError: Another status came.
    """
    return asyncio.run(_load(address, payload, tasks, connections, seconds, requests))


async def _load(
    address: str, payload: Payload, tasks: tuple[str, ...], connections: int, seconds: float, requests: int | None
) -> LoadResult:
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    started = loop.time()
    latencies: list[float] = []
    messages = [_message(address, payload, task) for task in tasks]

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 20)
        turn = number
        while loop.time() - started < seconds and (requests is None or len(latencies) < requests):
            sent = loop.time()
            writer.write(messages[turn % len(messages)])
            turn += connections + 1
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            body = await reader.readexactly(length)
            if b" 200 " not in head.split(b"\r\n", 1)[0]:
                raise RuntimeError(f"{head!r} {body[:300]!r}")
            latencies.append(loop.time() - sent)
        writer.close()

    await asyncio.gather(*(client(number) for number in range(connections)))
    return LoadResult(answers=len(latencies), seconds=loop.time() - started, latencies=latencies)


def _message(address: str, payload: Payload, task: str) -> bytes:
    head = {"host": address, "content-length": str(len(payload.body)), **payload.headers}
    lines = [f"POST {payload.path.format(task=task)} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + payload.body
