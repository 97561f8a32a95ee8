"""What people write by hand, and LitServe, with one ONNX session a task.

    python peer_servers.py fastapi|litserve FOLDER PORT THREADS

``FOLDER`` holds one folded model for each task. Both servers decode as vpdeploy does, and answer the five best classes
of a JPEG, and the logits of raw pixels.
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from vpdeploy.format.folded import FoldedCard
from vpdeploy.image import load_pixels


class Model:
    """One task's session."""

    def __init__(self, path: Path, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.name = path.stem
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        card = FoldedCard.read(path)
        self.preprocessing = card.task.preprocessing
        self.labels = card.task.labels

    def pixels(self, body: bytes, content_type: str) -> np.ndarray:
        side = self.preprocessing.image_size
        if content_type == "application/octet-stream":
            return np.frombuffer(body, np.uint8).reshape(side, side, 3)
        return load_pixels(body, self.preprocessing)

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        return self.session.run(["logits"], {"image": pixels})[0]

    def answer(self, logits: np.ndarray, content_type: str) -> dict[str, Any]:
        if content_type == "application/octet-stream":
            return {"logits": logits.tolist()}
        odds = np.exp(logits - logits.max())
        odds /= odds.sum()
        best = np.argsort(-odds)[:5]
        return {
            "predictions": [{"label": self.labels[index], "probability": float(odds[index])} for index in best.tolist()]
        }


def serve_fastapi(models: list[Path], port: int, threads: int) -> None:
    """As a careful engineer would: sessions loaded once, decoding and running in the framework's threads."""
    import uvicorn
    from fastapi import FastAPI, Request
    from starlette.concurrency import run_in_threadpool

    app = FastAPI()
    loaded = {path.stem: Model(path, threads) for path in models}

    @app.post("/v1/tasks/{task}:predict")
    async def predict(task: str, request: Request) -> dict[str, Any]:
        model, body = loaded[task], await request.body()
        content_type = request.headers.get("content-type", "")

        def work() -> dict[str, Any]:
            pixels = model.pixels(body, content_type)
            return model.answer(model.logits(pixels[None])[0], content_type)

        return await run_in_threadpool(work)

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


def serve_litserve(models: list[Path], port: int, threads: int) -> None:
    """One API, and so one worker process, for each task: that is how LitServe serves several models."""
    import litserve

    class TaskApi(litserve.LitAPI):  # type: ignore[misc]
        def __init__(self, path: Path) -> None:
            super().__init__(max_batch_size=8, batch_timeout=0.002, api_path=f"/v1/tasks/{path.stem}:predict")
            self._path = path

        def setup(self, device: str) -> None:
            self._model = Model(self._path, threads)

        def decode_request(self, request: Any) -> tuple[bytes, str]:
            return base64.b64decode(request["image"]), request["type"]  # as its documentation sends images

        def batch(self, inputs: list[tuple[bytes, str]]) -> tuple[np.ndarray, list[str]]:
            return np.stack([self._model.pixels(*each) for each in inputs]), [kind for _, kind in inputs]

        def predict(self, batch: Any) -> Any:
            if isinstance(batch[0], bytes):  # a single one is not batched
                return [self._model.answer(self._model.logits(self._model.pixels(*batch)[None])[0], batch[1])]
            logits = self._model.logits(batch[0])
            return [self._model.answer(row, kind) for row, kind in zip(logits, batch[1], strict=True)]

        def unbatch(self, output: Any) -> Any:
            return list(output)

        def encode_response(self, output: Any) -> Any:
            return output[0] if isinstance(output, list) else output

    server = litserve.LitServer([TaskApi(path) for path in models], accelerator="cpu", timeout=60)
    server.run(host="127.0.0.1", port=port, num_api_servers=1, generate_client_file=False, log_level="error")


if __name__ == "__main__":
    kind, folder, port, threads = sys.argv[1:]
    paths = sorted(Path(folder).glob("*.onnx"))
    {"fastapi": serve_fastapi, "litserve": serve_litserve}[kind](paths, int(port), int(threads))
