"""What a task answers, as tensors of the Open Inference Protocol v2, and how it describes itself as a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import vpdeploy
from vpdeploy.format.layout import IMAGE, LOGITS
from vpdeploy.server.access import Grant
from vpdeploy.server.oip_request import LABEL, PROBABILITIES, InferRequest
from vpdeploy.server.oip_tensors import OutputTensor, Values
from vpdeploy.server.service import Classified, ServedTask, Service
from vpdeploy.server.statistics import WHOLE
from vpdeploy.serving.batcher import BatchSettings
from vpdeploy.serving.queue import LAST_PRIORITY, NORMAL_PRIORITY, Logits

PLATFORM = "vpdeploy"

PRIORITIES = {"priority_levels": LAST_PRIORITY, "default_priority_level": NORMAL_PRIORITY}

PADDING = -30000.0
"""What stands in logits where a task has no such class: its probability is 0, and JSON can write it."""


def output_tensors(request: InferRequest, answers: Sequence[Classified]) -> list[OutputTensor]:
    """Return the outputs that a request asks for, in its order.

    Args:
        request: What was asked.
        answers: One answer for each image; where tasks have fewer classes than others, their rows are filled up, with
            ``PADDING`` in logits, with 0 in probabilities.
    """
    tensors: list[OutputTensor] = []
    for output in request.outputs:
        values = _VALUES[output.name](answers)
        if output.class_count:
            values = _classification(values, answers, output.class_count)
        tensors.append(OutputTensor(name=output.name, values=values))
    return tensors


def server_metadata(batching: BatchSettings) -> dict[str, Any]:
    """Describe the server and the size of its batches."""
    return {
        "name": "vpdeploy",
        "version": vpdeploy.__version__,
        "extensions": [
            "binary_tensor_data",
            "classification",
            "model_configuration",
            "model_repository",
            "parameters",
            "schedule_policy",
            "statistics",
        ],
        "parameters": {
            "max_batch_size": batching.max_batch_size,
            "max_batch_size_reason": batching.size_reason,
        },
    }


def repository_index(service: Service, grant: Grant) -> list[dict[str, str]]:
    """List the tasks that exist for a token, those that are damaged or unloaded, and the bundle."""
    ready = [
        {"name": task.card.name, "version": str(task.version), "state": "READY", "reason": ""}
        for task in service.tasks(grant)
    ]
    failed = [
        {"name": name, "version": "", "state": "UNAVAILABLE", "reason": reason}
        for name, reason in service.failures(grant).items()
        if name not in service.session.tasks
    ]
    unloaded = [
        {"name": name, "version": "", "state": "UNAVAILABLE", "reason": "unloaded"}
        for name in grant.covered(service.session.unloaded)
    ]
    whole = {"name": WHOLE[0], "version": str(WHOLE[1]), "state": "READY", "reason": ""}
    return [*ready, *failed, *unloaded, whole]


def model_statistics(service: Service, grant: Grant, task: ServedTask | None) -> dict[str, Any]:
    """Return Triton's statistics of one task, or of all that exist for a token."""
    names = {task.card.name} if task is not None else {each.card.name for each in service.tasks(grant)}
    return {"model_stats": [each.to_json() for each in service.statistics.read() if each.task in names]}


def model_metadata(task: ServedTask, image_size: int) -> dict[str, Any]:
    """Describe a task as a model: inputs, outputs, labels."""
    classes = len(task.card.labels)
    return {
        "name": task.card.name,
        "versions": [str(task.version)],
        "platform": PLATFORM,
        "inputs": [{"name": IMAGE, "datatype": "UINT8", "shape": [-1, image_size, image_size, 3]}],
        "outputs": [
            {"name": LOGITS, "datatype": "FP32", "shape": [-1, classes]},
            {"name": PROBABILITIES, "datatype": "FP32", "shape": [-1, classes]},
            {"name": LABEL, "datatype": "BYTES", "shape": [-1]},
        ],
        "parameters": {
            "labels": list(task.card.labels),
            "method": task.card.method,
            "backbone": task.card.backbone.name,
            "image": f"pixels, UINT8 [-1, {image_size}, {image_size}, 3], or encoded files, BYTES [-1]",
        },
    }


def model_config(task: ServedTask, image_size: int, max_batch_size: int) -> dict[str, Any]:
    """Describe a task the way Triton describes a model's configuration, for its load generator."""
    classes = len(task.card.labels)
    return {
        "name": task.card.name,
        "platform": PLATFORM,
        "backend": PLATFORM,
        "max_batch_size": max_batch_size,
        "input": [{"name": IMAGE, "data_type": "TYPE_UINT8", "dims": [image_size, image_size, 3]}],
        "output": [
            {"name": LOGITS, "data_type": "TYPE_FP32", "dims": [classes]},
            {"name": PROBABILITIES, "data_type": "TYPE_FP32", "dims": [classes]},
            {"name": LABEL, "data_type": "TYPE_STRING", "dims": []},
        ],
        "dynamic_batching": PRIORITIES,
    }


def _logits(answers: Sequence[Classified]) -> Values:
    return _stacked([answer.logits for answer in answers], PADDING)


def _probabilities(answers: Sequence[Classified]) -> Values:
    return _stacked([answer.probabilities for answer in answers], 0.0)


def _stacked(rows: Sequence[Logits], padding: float) -> Values:
    width = max(map(len, rows))
    stacked = np.full((len(rows), width), padding, dtype=np.float32)
    for target, row in zip(stacked, rows, strict=True):
        target[: len(row)] = row
    return stacked


def _labels(answers: Sequence[Classified]) -> Values:
    return np.array([answer.task.card.labels[int(answer.logits.argmax())] for answer in answers], dtype=object)


_VALUES: dict[str, Callable[[Sequence[Classified]], Values]] = {
    LOGITS: _logits,
    PROBABILITIES: _probabilities,
    LABEL: _labels,
}
"""How each output is made: arrays [B, C], or [B] of names."""


def _classification(values: Logits, answers: Sequence[Classified], count: int) -> Values:
    """Return the best classes as ``value:index:label``, object [B, min(count, C)]; empty where a task has fewer."""
    order = np.argsort(-values, axis=1, kind="stable")[:, :count]
    rows = []
    for row, best, answer in zip(values, order, answers, strict=True):
        labels = answer.task.card.labels
        rows.append([f"{row[index]:.6f}:{index}:{labels[index]}" if index < len(labels) else "" for index in best])
    return np.array(rows, dtype=object)
