"""The bundle as one more model: a request to it names the task of each image, and so mixes tasks as it likes."""

from __future__ import annotations

from typing import Any

from vpdeploy.errors import TaskNotFoundError
from vpdeploy.format.layout import IMAGE, LOGITS
from vpdeploy.server.access import Grant, Scope
from vpdeploy.server.oip_request import LABEL, PROBABILITIES, TASK, InferRequest
from vpdeploy.server.oip_response import PADDING, PLATFORM, PRIORITIES
from vpdeploy.server.service import Classified, ServedTask, Service
from vpdeploy.server.statistics import WHOLE
from vpdeploy.text import cut_name

BUNDLE_MODEL = WHOLE[0]
"""The bundle's name as a model; no task can have it."""

BUNDLE_VERSION = str(WHOLE[1])
BUNDLE_INPUTS = (IMAGE, TASK)


def check_bundle_version(version: str | None) -> None:
    """Check that a request for a version of the bundle can be answered.

    Raises:
        TaskNotFoundError: There is no such version.
    """
    if version not in (None, "", BUNDLE_VERSION):
        raise TaskNotFoundError(
            f"'{BUNDLE_MODEL}' is served in version {BUNDLE_VERSION}, not '{cut_name(version or '', 20)}'"
        )


async def classify_request(
    service: Service,
    request: InferRequest,
    task: ServedTask | None,
    *,
    grant: Grant,
    client: str,
    deadline_s: float | None,
) -> list[Classified]:
    """Answer a request that was sent to a task, or to the bundle where ``task`` is None."""
    names = request.tasks if task is None else (task.reference or task.card.name,) * len(request.images)
    return await service.ask(
        request.images,
        list(enumerate(names)),
        grant=grant,
        client=client,
        deadline_s=deadline_s,
        priority=request.priority,
    )


def model_of(task: ServedTask | None, answers: list[Classified]) -> tuple[str, str]:
    """Return name and version of the model that answered: of the task at the time of its answer, or of the bundle."""
    if task is None:
        return BUNDLE_MODEL, BUNDLE_VERSION
    return answers[0].task.card.name, str(answers[0].task.version)


def bundle_metadata(service: Service, grant: Grant) -> dict[str, Any]:
    """Describe the bundle as a model."""
    size = service.session.preprocessing.image_size
    return {
        "name": BUNDLE_MODEL,
        "versions": [BUNDLE_VERSION],
        "platform": PLATFORM,
        "inputs": [
            {"name": IMAGE, "datatype": "UINT8", "shape": [-1, size, size, 3]},
            {"name": TASK, "datatype": "BYTES", "shape": [-1]},
        ],
        "outputs": [
            {"name": LOGITS, "datatype": "FP32", "shape": [-1, -1]},
            {"name": PROBABILITIES, "datatype": "FP32", "shape": [-1, -1]},
            {"name": LABEL, "datatype": "BYTES", "shape": [-1]},
        ],
        "parameters": {
            "tasks": [task.card.name for task in service.tasks(grant)],
            "padding": f"{LOGITS} {PADDING}, {PROBABILITIES} 0: rows are as wide as the request's widest task",
        },
    }


def bundle_config(service: Service, grant: Grant) -> dict[str, Any]:
    """Describe the bundle the way Triton describes a model's configuration."""
    grant.require(Scope.INFER, Scope.ADMIN)
    size = service.session.preprocessing.image_size
    return {
        "name": BUNDLE_MODEL,
        "platform": PLATFORM,
        "backend": PLATFORM,
        "max_batch_size": service.settings.batching.max_batch_size,
        "input": [
            {"name": IMAGE, "data_type": "TYPE_UINT8", "dims": [size, size, 3]},
            {"name": TASK, "data_type": "TYPE_STRING", "dims": []},
        ],
        "output": [
            {"name": LOGITS, "data_type": "TYPE_FP32", "dims": [-1]},
            {"name": PROBABILITIES, "data_type": "TYPE_FP32", "dims": [-1]},
            {"name": LABEL, "data_type": "TYPE_STRING", "dims": []},
        ],
        "dynamic_batching": PRIORITIES,
    }


def bundle_statistics(service: Service, grant: Grant) -> dict[str, Any]:
    """Return Triton's statistics of the bundle: of all requests and batches of the server, whatever they named.

    Raises:
        TaskNotFoundError: The token is for some tasks only.
    """
    grant.require(Scope.INFER, Scope.ADMIN)
    if grant.tasks is not None:
        raise TaskNotFoundError(f"no statistics of '{BUNDLE_MODEL}' for this token: they tell of all tasks")
    return {"model_stats": [service.statistics.read_whole().to_json()]}
