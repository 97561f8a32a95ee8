"""``triton``: a model repository for Triton Inference Server; one ONNX model, whose task each row chooses by ``slot``.

The configuration follows the server's docs/user_guide/model_configuration.md: an input without dimensions of its own
is declared there as ``dims: [ 1 ]`` and reshaped to none.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final

from vpdeploy.errors import SpecError
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.layout import CLASS_AXIS, IMAGE, LOGITS, SLOT
from vpdeploy.format.manifest import GRAPH_FILE
from vpdeploy_export.onnx.save import save_model
from vpdeploy_export.parity import TOLERANCES
from vpdeploy_export.targets.constant import constant_table, slots_of, task_facts
from vpdeploy_export.targets.labels import write_labels
from vpdeploy_export.targets.runtime import PlainSession, SlotAnswerer
from vpdeploy_export.targets.target import Conversion, Target, TargetOptions, Written

CONFIG_FILE = "config.pbtxt"
VERSION_FOLDER = "1"
DEFAULT_MAX_BATCH: Final = 32
DEFAULT_QUEUE_DELAY_MS: Final = 2.0
DEVICES: Final = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "gpu": "KIND_GPU"}

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def _destination(bundle: Path, out: Path, options: TargetOptions) -> Path:
    """Return the model's folder in the repository ``out``.

    Raises:
        SpecError: The name cannot be a model's.
    """
    name = bundle.resolve().name if options.name is None else options.name
    if not _NAME.fullmatch(name):
        raise SpecError(
            f"'{name}' cannot name a model: expected 1 to 100 letters, digits, '.', '_' or '-', starting with a letter "
            "or digit; give another --name"
        )
    return out / name


def _check(artifact: Artifact, options: TargetOptions) -> None:
    """Refuse impossible options.

    Raises:
        SpecError: An option is out of range.
    """
    if options.device is not None and options.device not in DEVICES:
        raise SpecError(f"--device '{options.device}': choose one of {', '.join(DEVICES)}")
    if options.max_batch is not None and options.max_batch < 1:
        raise SpecError(f"--max-batch {options.max_batch}: should be at least 1")
    if options.queue_delay_ms is not None and not 0 <= options.queue_delay_ms <= 60_000:
        raise SpecError(f"--queue-delay-ms {options.queue_delay_ms:g}: should be from 0 to 60000")


def _write(conversion: Conversion, folder: Path) -> Written:
    """Write the model, its configuration and labels."""
    version = folder / VERSION_FOLDER
    version.mkdir()
    model, table = constant_table(conversion)
    save_model(model, version / GRAPH_FILE)
    tasks = task_facts(conversion)
    for name, facts in tasks.items():
        facts["label_file"] = write_labels(folder, name, facts["labels"])
    label_files = [facts["label_file"] for facts in tasks.values()]
    options = conversion.options
    name = _destination(conversion.artifact.path, folder, options).name
    size = conversion.artifact.preprocessing.image_size
    config = render_config(
        name=name,
        image_size=size,
        classes=table.sizes[CLASS_AXIS],
        # An output has one file of labels; with several tasks the labels depend on the request.
        label_file=label_files[0] if len(label_files) == 1 else None,
        max_batch=DEFAULT_MAX_BATCH if options.max_batch is None else options.max_batch,
        queue_delay_ms=DEFAULT_QUEUE_DELAY_MS if options.queue_delay_ms is None else options.queue_delay_ms,
        device=options.device or "auto",
    )
    (folder / CONFIG_FILE).write_text(config, encoding="utf-8")
    session = PlainSession(conversion.cpu_graph(version / GRAPH_FILE))
    return Written(
        graph={"file": f"{VERSION_FOLDER}/{GRAPH_FILE}", "model_name": name},
        tasks=tasks,
        answerer=SlotAnswerer(session=session, slots=slots_of(tasks)),
        tolerance=TOLERANCES[conversion.artifact.precision].converted,
        next_step="tritonserver --model-repository={out}",
    )


def render_config(
    *,
    name: str,
    image_size: int,
    classes: int,
    label_file: str | None,
    max_batch: int,
    queue_delay_ms: float,
    device: str,
) -> str:
    """Return the text of ``config.pbtxt``.

    Args:
        name: Of the model and its folder.
        image_size: Side of the images, in pixels.
        classes: C of the table.
        label_file: Labels of the output, relative to the model's folder, or None.
        max_batch: Images in one run at most.
        queue_delay_ms: How long a batch waits to fill.
        device: A key of ``DEVICES``.
    """
    preferred = sorted({max(1, max_batch // 4), max(1, max_batch // 2), max_batch})
    labels = "" if label_file is None else f"\n    label_filename: {json.dumps(label_file)}"
    return f"""name: {json.dumps(name)}
backend: "onnxruntime"
max_batch_size: {max_batch}
default_model_filename: "{GRAPH_FILE}"
input [
  {{
    name: "{IMAGE}"
    data_type: TYPE_UINT8
    dims: [ {image_size}, {image_size}, 3 ]
  }},
  {{
    name: "{SLOT}"
    data_type: TYPE_INT32
    dims: [ 1 ]
    reshape: {{ shape: [ ] }}
  }}
]
output [
  {{
    name: "{LOGITS}"
    data_type: TYPE_FP32
    dims: [ {classes} ]{labels}
  }}
]
dynamic_batching {{
  preferred_batch_size: [ {", ".join(map(str, preferred))} ]
  max_queue_delay_microseconds: {round(queue_delay_ms * 1000)}
}}
instance_group [
  {{
    count: 1
    kind: {DEVICES[device]}
  }}
]
"""


TRITON = Target(
    takes=frozenset({"name", "max_batch", "queue_delay_ms", "device"}),
    destination=_destination,
    check=_check,
    write=_write,
)
