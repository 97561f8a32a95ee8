"""``onnx-adapter``: one ONNX model and an adapter file for each task, for ONNX Runtime in any language.

The table's inputs become overridable initializers that hold the first task; an adapter overrides them for a run
(https://onnxruntime.ai/docs/genai/tutorials/finetune.html; ``LoraAdapter`` and ``RunOptions.add_active_adapter``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vpdeploy.format.manifest import GRAPH_FILE
from vpdeploy.format.tensorfile import Tensors
from vpdeploy_export.onnx.save import save_model
from vpdeploy_export.parity import TOLERANCES
from vpdeploy_export.passes import TableDefaultsPass, ZeroSlotPass
from vpdeploy_export.targets.labels import write_labels
from vpdeploy_export.targets.runtime import PlainSession
from vpdeploy_export.targets.target import Conversion, Target, Written

README_FILE = "README.txt"


def _write(conversion: Conversion, folder: Path) -> Written:
    """Write the model, the adapters, labels and a readme."""
    first = conversion.prompt_sets[0]
    model = conversion.graph(TableDefaultsPass(conversion.tensors(first)), ZeroSlotPass())
    save_model(model, folder / GRAPH_FILE)
    tasks: dict[str, Mapping[str, Any]] = {}
    for prompt_set in conversion.prompt_sets:
        name = prompt_set.card.name
        tensors = conversion.tensors(prompt_set)
        version = conversion.artifact.versions[name]
        write_adapter(folder / f"{name}.onnx_adapter", tensors, version=version)
        tasks[name] = {
            "adapter": f"{name}.onnx_adapter",
            "version": version,
            "labels": list(prompt_set.card.labels),
            "label_file": write_labels(folder, name, prompt_set.card.labels),
            "shapes": {tensor: list(array.shape) for tensor, array in tensors.items()},
        }
    (folder / README_FILE).write_text(_readme(conversion, first.card.name), encoding="utf-8")
    return Written(
        graph={"file": GRAPH_FILE, "default_task": first.card.name},
        tasks=tasks,
        answerer=_Adapters(folder, conversion.cpu_graph(folder / GRAPH_FILE)),
        tolerance=TOLERANCES[conversion.artifact.precision].converted,
        next_step=f"{{path}}/{README_FILE}",
    )


def write_adapter(path: Path, tensors: Tensors, *, version: int) -> None:
    """Write tensors as an ``.onnx_adapter`` file.

    Args:
        path: The file.
        tensors: One slot by input name, [1, ...].
        version: The task's, kept in the file as ``adapter_version``.
    """
    import onnxruntime

    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(version)
    adapter.set_model_version(1)
    # ONNX Runtime reads these arrays while it writes; the dictionary keeps them alive until then.
    adapter.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in tensors.items()})
    adapter.export_adapter(str(path.resolve()))


class _Adapters:
    """Answers with the written files alone; see ``vpdeploy_export.parity.Answerer``.

    Args:
        folder: Where they lie.
        graph: The model, as the CPU can run it.
    """

    def __init__(self, folder: Path, graph: Path) -> None:
        self._folder = folder
        self._session = PlainSession(graph)

    @property
    def runtime(self) -> str:
        """See ``Answerer.runtime``."""
        return self._session.provider

    @property
    def mixes_tasks(self) -> bool:
        """See ``Answerer.mixes_tasks``; an adapter holds for a whole run."""
        return False

    def answer(self, pixels: npt.NDArray[np.uint8], tasks: Sequence[str]) -> npt.NDArray[np.float32]:
        """See ``Answerer.answer``; all rows are of one task."""
        import onnxruntime

        (task,) = set(tasks)
        adapter = onnxruntime.LoraAdapter()
        adapter.Load(str((self._folder / f"{task}.onnx_adapter").resolve()))
        options = onnxruntime.RunOptions()
        options.add_active_adapter(adapter)
        return self._session.run(pixels, run_options=options)


def _readme(conversion: Conversion, default: str) -> str:
    size = conversion.artifact.preprocessing.image_size
    names = ", ".join(prompt_set.card.name for prompt_set in conversion.prompt_sets)
    last = conversion.prompt_sets[-1].card.name
    return f"""One model and an adapter for each task, for ONNX Runtime 1.20 or newer in any language.

Tasks: {names}. Without an adapter the model answers for '{default}'.
Input:  image   uint8 [batch, {size}, {size}, 3], RGB, resized as 'preprocessing' in tasks.json says.
Output: logits  float32 [batch, classes of the task]; class N is line N, from 0, of labels/TASK.txt.

    import numpy as np, onnxruntime as ort

    session = ort.InferenceSession("{GRAPH_FILE}")
    adapter = ort.LoraAdapter()
    adapter.Load("{last}.onnx_adapter")
    options = ort.RunOptions()
    options.add_active_adapter(adapter)
    image = np.zeros((1, {size}, {size}, 3), np.uint8)
    logits = session.run(["logits"], {{"image": image}}, options)[0]
    print(open("labels/{last}.txt").read().splitlines()[logits[0].argmax()])

An adapter holds for a whole run: one task in one batch. Runs through IOBinding ignore adapters. ONNX Runtime warns of
each tensor that an adapter may replace ("appears in graph inputs"); that is intended.
"""


ONNX_ADAPTER = Target(write=_write)
