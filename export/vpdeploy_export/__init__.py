"""vpdeploy_export: compiling trained models into ONNX graphs and bundles (extra ``export``).

``export_model`` writes a folded file or a bundle, ``add_task`` publishes one more task into a bundle, ``verify``
compares what was written with trained models on any images and runtimes, and ``convert`` writes a bundle for others.

Example:
    >>> models = vpdeploy_export.TrainedModel.of_runs([flowers_run, birds_run])
    >>> report = vpdeploy_export.export_model(models, Path("flora"), target=vpdeploy_export.Switchable())
    >>> [each.task for each in report.parity]
    ['flowers', 'birds']
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vpdeploy.lazy import lazy_names

if TYPE_CHECKING:
    from vpdeploy_export.conversion import convert as convert
    from vpdeploy_export.export import ExportReport as ExportReport
    from vpdeploy_export.export import add_task as add_task
    from vpdeploy_export.export import export_model as export_model
    from vpdeploy_export.forms import Folded as Folded
    from vpdeploy_export.forms import Switchable as Switchable
    from vpdeploy_export.models import TrainedModel as TrainedModel
    from vpdeploy_export.parity import ParityReport as ParityReport
    from vpdeploy_export.targets.target import TargetOptions as TargetOptions
    from vpdeploy_export.verification import verify as verify

__all__ = [
    "ExportReport",
    "Folded",
    "ParityReport",
    "Switchable",
    "TargetOptions",
    "TrainedModel",
    "add_task",
    "convert",
    "export_model",
    "verify",
]

# The package itself loads neither torch nor onnx: a name is imported when it is first asked for.
__getattr__ = lazy_names(
    __name__,
    {
        "ExportReport": "export",
        "Folded": "forms",
        "ParityReport": "parity",
        "Switchable": "forms",
        "TargetOptions": "targets.target",
        "TrainedModel": "models",
        "add_task": "export",
        "convert": "conversion",
        "export_model": "export",
        "verify": "verification",
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
