"""Plain ONNX Runtime, as a user of a converted model calls it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vpdeploy.backends.providers import QUIET, one_line, onnxruntime
from vpdeploy.errors import BackendError
from vpdeploy.layout import IMAGE, LOGITS


class PlainSession:
    """An ONNX model in ONNX Runtime's CPU provider, or with the session options given.

    Args:
        path: The model.
        options: Session options with providers; None is the CPU's.

    Raises:
        BackendError: The model cannot be loaded.
    """

    def __init__(self, path: Path, options: Any = None) -> None:
        module = onnxruntime()
        settings = module.SessionOptions() if options is None else options
        settings.intra_op_num_threads = torch.get_num_threads()
        settings.log_severity_level = QUIET  # an overridable initializer is a warning to ONNX Runtime
        providers = {"providers": ["CPUExecutionProvider"]} if options is None else {}
        try:
            self._session = module.InferenceSession(str(path), settings, **providers)
        except Exception as error:  # ONNX Runtime raises a class of its own per status code
            raise BackendError(f"{path.name}: ONNX Runtime cannot load it: {one_line(error)}") from error

    def run(
        self, image: npt.NDArray[np.uint8], *, run_options: Any = None, **inputs: npt.NDArray[Any]
    ) -> npt.NDArray[np.float32]:
        """Return logits [B, C].

        Raises:
            BackendError: The run failed.
        """
        try:
            (logits,) = self._session.run([LOGITS], {IMAGE: image, **inputs}, run_options)
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed on a batch of {len(image)}: {one_line(error)}") from error
        result: npt.NDArray[np.float32] = logits
        return result
