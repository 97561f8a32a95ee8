"""The errors of vpdeploy.

::

    VpdeployError
    ├── SpecError                what was asked for does not fit together (options, data, runs)
    ├── InputError               an image or a request body cannot be used
    ├── BundleError              a bundle, run or exported model cannot be used
    │   ├── BundleCorruptError   truncated, tampered with or incomplete
    │   ├── BundleVersionError   written in a format this version does not read
    │   └── StorageFullError     there is no room for what was to be written
    ├── VersionConflictError     a task is at another version than a change was meant for
    ├── LayoutMismatchError      a compiled prompt set does not fit the graph
    ├── TaskNotFoundError        no task of that name is loaded
    ├── TableFullError           no slot is left for another prompt set
    ├── BuildError               an engine cannot be built
    │   └── EngineIncompatibleError   an engine was built for something else
    ├── ExportError              a run cannot be exported
    │   └── ParityError          the exported graph does not reproduce the trained model
    ├── TrainingError            training cannot go on (non-finite loss, unusable state)
    ├── BackendError             the inference runtime failed
    ├── QueueFullError           the server has as much work as it accepts
    ├── DeadlineExceededError    a request was not answered within its deadline
    ├── ShuttingDownError        the server no longer accepts work
    └── MissingExtraError        an optional dependency is not installed

Every message says what is wrong, what was expected and what to do, in one line. The errors know nothing of exit
codes or HTTP: ``vpdeploy.cli.exits`` and ``vpdeploy.server.statuses`` hold one table each.

Example:
    Catch the class that says what you can do about it, or the root for everything that vpdeploy raises on purpose:

    >>> try:
    ...     vpdeploy.load("nowhere")
    ... except vpdeploy.BundleError as error:
    ...     print(error)
    nowhere: does not exist; expected a bundle folder or an .onnx file of vpdeploy export
"""

from __future__ import annotations


class VpdeployError(Exception):
    """Base of every error that vpdeploy raises on purpose."""


class SpecError(VpdeployError):
    """What was asked for does not fit together: an option, a data set, a combination of runs."""


class InputError(VpdeployError):
    """An image, array or request body cannot be used."""


class BundleError(VpdeployError):
    """A bundle, run or exported model cannot be used."""


class BundleCorruptError(BundleError):
    """A file is truncated, tampered with or incomplete."""


class BundleVersionError(BundleError):
    """A file is written in a format that this version of vpdeploy does not read."""


class StorageFullError(BundleError):
    """There is no room for what was to be written; everything is as it was."""


class VersionConflictError(VpdeployError):
    """A task is at another version than a change was meant for; nothing was changed."""


class LayoutMismatchError(VpdeployError):
    """A compiled prompt set does not fit the graph it should be switched into."""


class TaskNotFoundError(VpdeployError):
    """No task of that name is loaded."""


class TableFullError(VpdeployError):
    """No slot is left in the table for another prompt set."""


class BuildError(VpdeployError):
    """An engine cannot be built."""


class EngineIncompatibleError(BuildError):
    """An engine was built for another GPU, runtime version or graph."""


class ExportError(VpdeployError):
    """A run cannot be exported."""


class ParityError(ExportError):
    """The exported graph does not reproduce the trained model within tolerance."""


class TrainingError(VpdeployError):
    """Training cannot go on: non-finite loss, or a state that cannot be resumed."""


class BackendError(VpdeployError):
    """The inference runtime failed, or none that was asked for works here."""


class QueueFullError(VpdeployError):
    """The queue holds as many images as it accepts; try again later."""


class DeadlineExceededError(VpdeployError):
    """A request was not answered within its deadline."""


class ShuttingDownError(VpdeployError):
    """The server is shutting down and accepts no new work."""


class MissingExtraError(VpdeployError):
    """An optional dependency is not installed.

    Args:
        module: The import name that is missing.
        extra: The extra of vpdeploy that brings it.
    """

    def __init__(self, module: str, extra: str) -> None:
        self.module = module
        self.extra = extra
        super().__init__(f"'{module}' is not installed: pip install 'vpdeploy[{extra}]'")
