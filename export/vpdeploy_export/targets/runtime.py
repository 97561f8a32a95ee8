"""Plain ONNX Runtime, as a user of a converted model calls it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vpdeploy.backends.providers import CPU_PROVIDER, open_session, ort_errors
from vpdeploy.layout import IMAGE, LOGITS


class PlainSession:
    """An ONNX model in one of ONNX Runtime's providers.

    Args:
        path: The model.
        provider: A key of ``PROVIDERS``.

    Raises:
        BackendError: The model cannot be loaded, or the provider does not work here.
    """

    def __init__(self, path: Path, provider: str = CPU_PROVIDER) -> None:
        self._session = open_session(path, provider, threads=torch.get_num_threads())

    def run(
        self, image: npt.NDArray[np.uint8], *, run_options: Any = None, **inputs: npt.NDArray[Any]
    ) -> npt.NDArray[np.float32]:
        """Return logits [B, C].

        Raises:
            BackendError: The run failed.
        """
        with ort_errors(f"ONNX Runtime failed on a batch of {len(image)}"):
            (logits,) = self._session.run([LOGITS], {IMAGE: image, **inputs}, run_options)
        result: npt.NDArray[np.float32] = logits
        return result
