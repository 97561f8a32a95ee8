"""vpdeploy_train: learning and pruning prompt sets on a frozen timm vision transformer (extra ``train``).

``train_run`` learns a task's prompts, ``evaluate_run`` says how good they are, and ``import_checkpoint`` takes those of
the public VPT, E²VPT and VAPT code. What they write is a run; ``vpdeploy_export`` turns runs into something to deploy.

Example:
    >>> settings = vpdeploy_train.TrainSettings.of(data=photos, method="linear", epochs=1)
    >>> result = vpdeploy_train.train_run(settings, Path("runs/first"))
    >>> vpdeploy_train.evaluate_run(result.run).evaluation.images
    9
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vpdeploy.lazy import lazy_names

if TYPE_CHECKING:
    from vpdeploy_train.backbone import load_backbone as load_backbone
    from vpdeploy_train.evaluation import RunEvaluation as RunEvaluation
    from vpdeploy_train.evaluation import evaluate_run as evaluate_run
    from vpdeploy_train.importing.backbone import BackboneChoice as BackboneChoice
    from vpdeploy_train.importing.importing import import_checkpoint as import_checkpoint
    from vpdeploy_train.pruning.report import PruningReport as PruningReport
    from vpdeploy_train.results import ImportResult as ImportResult
    from vpdeploy_train.results import TrainingResult as TrainingResult
    from vpdeploy_train.run import Run as Run
    from vpdeploy_train.settings import TrainSettings as TrainSettings
    from vpdeploy_train.training import train_run as train_run

__all__ = [
    "BackboneChoice",
    "ImportResult",
    "PruningReport",
    "Run",
    "RunEvaluation",
    "TrainSettings",
    "TrainingResult",
    "evaluate_run",
    "import_checkpoint",
    "load_backbone",
    "train_run",
]

# The command line starts without torch, so a name is imported when it is first asked for.
__getattr__ = lazy_names(
    __name__,
    {
        "BackboneChoice": "importing.backbone",
        "ImportResult": "results",
        "PruningReport": "pruning.report",
        "Run": "run",
        "RunEvaluation": "evaluation",
        "TrainSettings": "settings",
        "TrainingResult": "results",
        "evaluate_run": "evaluation",
        "import_checkpoint": "importing.importing",
        "load_backbone": "backbone",
        "train_run": "training",
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
