"""vpdeploy: prompt-tuned vision transformers in production.

``load`` opens what ``vpdeploy export`` wrote, as a ``Session`` that answers images of all its tasks; a ``Batcher`` runs
the requests of many threads together. Training and exporting live in ``vpdeploy_train`` and ``vpdeploy_export``.

Example:
    >>> with vpdeploy.load(zoo) as session:
    ...     answers = session.predict([rose, rose], task="flowers")
    >>> [answer.label == answers[0].label for answer in answers]
    [True, True]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vpdeploy import errors as errors
from vpdeploy.errors import (
    BackendError,
    BundleError,
    DeadlineExceededError,
    InputError,
    LayoutMismatchError,
    MissingExtraError,
    QueueFullError,
    ShuttingDownError,
    SpecError,
    TaskNotFoundError,
    VpdeployError,
)
from vpdeploy.lazy import lazy_names

if TYPE_CHECKING:
    from vpdeploy.serving.batcher import Batcher as Batcher
    from vpdeploy.serving.batcher import BatchSettings as BatchSettings
    from vpdeploy.session.batch_size import choose_batch_size as choose_batch_size
    from vpdeploy.session.session import Session as Session
    from vpdeploy.session.session import load as load

__all__ = [
    "BackendError",
    "BatchSettings",
    "Batcher",
    "BundleError",
    "DeadlineExceededError",
    "InputError",
    "LayoutMismatchError",
    "MissingExtraError",
    "QueueFullError",
    "Session",
    "ShuttingDownError",
    "SpecError",
    "TaskNotFoundError",
    "VpdeployError",
    "__version__",
    "choose_batch_size",
    "errors",
    "load",
]

__version__ = "0.1.0"

# What needs NumPy waits until it is asked for: ``import vpdeploy`` itself loads the errors alone.
__getattr__ = lazy_names(
    __name__,
    {
        "load": "session.session",
        "Session": "session.session",
        "Batcher": "serving.batcher",
        "BatchSettings": "serving.batcher",
        "choose_batch_size": "session.batch_size",
    },
)


def __dir__() -> list[str]:
    """Return the public names, loaded or not."""
    return sorted({*globals(), *__all__})
