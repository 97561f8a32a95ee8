"""Plain ONNX Runtime, as a user of a converted model calls it, and its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vpdeploy.backends.providers import CPU_PROVIDER, open_session, ort_errors
from vpdeploy.format.layout import IMAGE, LOGITS, SLOT


class PlainSession:
    """An ONNX model in one of ONNX Runtime's providers.

    Args:
        path: The model.
        provider: A key of ``PROVIDERS``.

    Raises:
        BackendError: The model cannot be loaded, or the provider does not work here.
    """

    def __init__(self, path: Path, provider: str = CPU_PROVIDER) -> None:
        self.provider = provider
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


@dataclass(frozen=True, kw_only=True)
class SlotAnswerer:
    """A converted model whose rows choose their task by ``slot``; see ``vpdeploy_export.parity.Answerer``.

    Attributes:
        session: The model.
        slots: The slot of each task.
        max_batch: Images in one run at most; None is any number.
    """

    session: PlainSession
    slots: Mapping[str, int]
    max_batch: int | None = None

    @property
    def runtime(self) -> str:
        """See ``Answerer.runtime``."""
        return self.session.provider

    @property
    def mixes_tasks(self) -> bool:
        """See ``Answerer.mixes_tasks``."""
        return True

    def answer(self, pixels: npt.NDArray[np.uint8], tasks: Sequence[str]) -> npt.NDArray[np.float32]:
        """See ``Answerer.answer``."""
        slots = np.array([self.slots[task] for task in tasks], np.int32)
        step = self.max_batch or len(pixels)
        parts = [
            self.session.run(pixels[start : start + step], **{SLOT: slots[start : start + step]})
            for start in range(0, len(pixels), step)
        ]
        return np.concatenate(parts)
