"""Plain FastAPI with one ONNX session a task, as people write it by hand.

    python plain_fastapi.py FOLDER PORT THREADS

``FOLDER`` holds one folded model for each task. It decodes as vpdeploy does, and answers the five best classes of a
JPEG, and the logits of raw pixels.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from starlette.requests import Request

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


def serve(models: list[Path], port: int, threads: int) -> None:
    """As a careful engineer would: sessions loaded once, decoding and running in the framework's threads."""
    import uvicorn
    from fastapi import FastAPI
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


if __name__ == "__main__":
    folder, port, threads = sys.argv[1:]
    serve(sorted(Path(folder).glob("*.onnx")), int(port), int(threads))
