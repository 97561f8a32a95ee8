"""LitServe with one API, and so one worker process, for each task: that is how it serves several models.

    python lit_server.py FOLDER PORT THREADS

``FOLDER`` holds one folded model for each task.
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from typing import Any

import litserve
import numpy as np
from plain_fastapi import Model


class TaskApi(litserve.LitAPI):  # type: ignore[misc]
    """One task."""

    def __init__(self, path: Path, threads: int) -> None:
        super().__init__(max_batch_size=8, batch_timeout=0.002, api_path=f"/v1/tasks/{path.stem}:predict")
        self._path = path
        self._threads = threads

    def setup(self, device: str) -> None:
        self._model = Model(self._path, self._threads)

    def decode_request(self, request) -> tuple[np.ndarray, str]:
        kind = request["type"]
        return self._model.pixels(base64.b64decode(request["image"]), kind), kind

    def batch(self, inputs: list[tuple[np.ndarray, str]]) -> tuple[np.ndarray, list[str]]:
        return np.stack([pixels for pixels, _ in inputs]), [kind for _, kind in inputs]

    def predict(self, batch: tuple[np.ndarray, list[str]]) -> list[dict[str, Any]]:
        pixels, kinds = batch
        return [self._model.answer(row, kind) for row, kind in zip(self._model.logits(pixels), kinds, strict=True)]

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


def main() -> None:
    folder, port, threads = sys.argv[1:]
    apis = [TaskApi(path, int(threads)) for path in sorted(Path(folder).glob("*.onnx"))]
    server = litserve.LitServer(apis, accelerator="cpu", timeout=60)
    server.run(host="127.0.0.1", port=int(port), num_api_servers=1, generate_client_file=False, log_level="error")


if __name__ == "__main__":
    main()
