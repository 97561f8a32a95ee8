"""Tables of invented prompt sets, and what a graph says of them when ONNX Runtime is asked directly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from core import toy

from vpdeploy.format.artifact import Artifact
from vpdeploy.format.layout import IMAGE, SLOT
from vpdeploy.format.promptset import CompiledPromptSet
from vpdeploy.table import Table

Pixels = npt.NDArray[np.uint8]
Slots = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]
MakePixels = Callable[..., Pixels]

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""How far float32 logits may be from the reference's."""


def slots(*numbers: int) -> Slots:
    """The slots that a batch's images ask for."""
    return np.array(numbers, np.int32)


def prompt_set(artifact: Artifact, seed: int, *, prefix: int = 3, classes: int = 5) -> CompiledPromptSet:
    """A random prompt set that fits the graph."""
    assert artifact.layout is not None
    return toy.prompt_set(
        f"task-{seed}",
        prefix=prefix,
        classes=classes,
        seed=seed,
        backbone=artifact.backbone,
        preprocessing=artifact.preprocessing,
        layout=artifact.layout,
    )


def table(artifact: Artifact, slots: int, *, prefix: int = 3, classes: int = 5, seed: int = 0) -> Table:
    """A table of random prompt sets."""
    return Table.of([prompt_set(artifact, seed + slot, prefix=prefix, classes=classes) for slot in range(slots)])


class Reference:
    """A graph asked directly, one image at a time, on the CPU."""

    def __init__(self, artifact: Artifact) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            str(artifact.graph_path), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, images: Pixels, slots: Slots | None = None, held: Table | None = None) -> Logits:
        rows = []
        for index in range(len(images)):
            feeds: dict[str, Any] = {IMAGE: images[index : index + 1]}
            if held is not None and slots is not None:
                feeds |= {SLOT: slots[index : index + 1], **held.arrays}
            rows.append(self._session.run(None, feeds)[0][0])
        return np.stack(rows)
