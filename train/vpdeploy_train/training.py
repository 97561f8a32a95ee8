"""A training run from settings to a finished run folder."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import asdict
from pathlib import Path

from vpdeploy.errors import SpecError
from vpdeploy.files import write_atomically
from vpdeploy.format.document import to_json
from vpdeploy.format.run import ARGS_FILE
from vpdeploy.format.task import TaskCard
from vpdeploy_train.backbone import Backbone
from vpdeploy_train.config import read_toml
from vpdeploy_train.data.resolve import missing_data
from vpdeploy_train.data.summary import DataSummary
from vpdeploy_train.device import choose_device, deterministic
from vpdeploy_train.inputs import TrainingInputs, load_inputs
from vpdeploy_train.methods import require_storable
from vpdeploy_train.methods.method import PromptDimensions
from vpdeploy_train.phases import PhasesResult, run_phases
from vpdeploy_train.place import (
    SKIPPED_FILE,
    check_begun,
    check_new_place,
    choose_task_name,
    note_beginning,
    note_task_name,
)
from vpdeploy_train.plots import plot_curves
from vpdeploy_train.progress import ConsoleProgress, Progress
from vpdeploy_train.pruning.picture import plot_pruning
from vpdeploy_train.pruning.request import shares_to_try
from vpdeploy_train.results import ChosenEpoch, PromptCounts, TrainingResult, Validation, metrics_to_json
from vpdeploy_train.run import Run
from vpdeploy_train.settings import TrainSettings
from vpdeploy_train.state import EpochRow
from vpdeploy_train.workbench import MakeProgress, Watch, Workbench


def console_progress(title: str, images: int, done: int) -> Progress:
    """Return a progress bar for a phase of so many images, of which some are done."""
    return ConsoleProgress(title, images=images, done=done)


def train_run(
    settings: TrainSettings,
    out: Path,
    *,
    resume: bool = False,
    name: str | None = None,
    make_progress: MakeProgress = console_progress,
    backbone: Backbone | None = None,
    inputs: TrainingInputs | None = None,
    watch: Watch = lambda row: None,
    cache_bytes: int | None = None,
) -> TrainingResult:
    """Train one task and write its run folder.

    A run that is interrupted at any moment can be resumed; it loses at most the current epoch and ends with the same
    bytes as an uninterrupted one.

    Args:
        settings: What the run is asked to do.
        out: The run folder.
        resume: Continue an interrupted run in ``out``.
        name: The task's name; None takes that of the run that is resumed, or of the folder.
        make_progress: Makes the progress display of each phase.
        backbone: The loaded backbone, where the caller trains several tasks on it.
        inputs: Loaded images and backbone, where the caller trains several times on them.
        watch: Is told of every epoch once it is stored, and of those that were stored before a resume; what it
            raises ends the training there.
        cache_bytes: Memory that decoded images may take; None takes half of what the training leaves free. The result
            does not depend on it.

    Returns:
        The run as it was written, and what it came to.

    Raises:
        SpecError: Settings, data or folder do not fit, or the name cannot name a task.
        InputError: Images cannot be decoded.
        TrainingError: The loss is not finite, or the stored state is damaged.

    Example:
        >>> settings = vpdeploy_train.TrainSettings.of(data=photos, method="vpt-deep", prompt_tokens=2, epochs=1)
        >>> result = vpdeploy_train.train_run(settings, Path("runs/photos"), name="photos")
        >>> result.run.card.labels
        ('blue', 'green', 'red')
        >>> 0 <= result.validation.accuracy <= 1 and result.prompts.parameters > 0
        True
    """
    # Refuse what cannot work before anything is loaded, then load images and backbone.
    _check_folder(settings, out, resume=resume)
    name = choose_task_name(out, name=name, resume=resume)
    settings = (_spelled_as_stored(settings, out) if resume else settings).located()
    device = choose_device(settings.device)
    if inputs is None:
        inputs = load_inputs(settings, backbone=backbone, cache_bytes=cache_bytes)

    if resume:
        _check_skipped(inputs, out)

    # Train, and where asked for prune; settings are noted only now, so that a refused folder stays usable.
    with deterministic(device):
        bench = Workbench.of(settings, inputs, out=out, device=device, make_progress=make_progress, watch=watch)
        method = bench.new_method(settings.seed)
        require_storable(settings.method, method, PromptDimensions.of(inputs.backbone.trunk))
        if settings.prunes:
            shares_to_try(settings, method)
        if resume:
            note_task_name(out, name)
        else:
            note_beginning(out, name=name, skipped=_skipped_text(inputs), settings=settings.to_toml())
        result = run_phases(bench)

    # Say what it came to, once in types and once, in the card's details, for people.
    source = inputs.source
    validation = _validation(result.best)
    chosen = _chosen(result)
    prompts = PromptCounts.of(result.model, inputs.backbone.vit)
    card = TaskCard(
        name=name,
        labels=source.labels,
        method=settings.method,
        backbone=inputs.backbone.identity,
        preprocessing=inputs.preprocessing,
        details={
            "hyperparameters": settings.to_fields() | result.pace.to_fields(),
            "images": {"train": len(source.train), "val": len(source.val), "test": len(source.test)},
            "data": DataSummary.of(source).to_json()
            | {"copies": inputs.copies.to_json(), "skipped": len(inputs.skipped)},
            "metrics": metrics_to_json(validation),
            "chosen": chosen.to_json(),
            "prompts": prompts.to_json(),
            "pruning": None if result.report is None else result.report.to_json(),
        },
    )
    run = Run(
        path=out,
        card=card,
        structure=result.model.method.structure(),
        state=result.model.trained_state(),
        data=settings.data,
        data_seed=settings.seed,
        val_fraction=settings.val_fraction,
        weights=settings.weights,
        pooling=settings.pooling,
    )

    # Write the run itself last: it is what makes the folder a finished run.
    _write_reports(out, result)
    run.write()
    return TrainingResult(run=run, validation=validation, chosen=chosen, prompts=prompts, pruning=result.report)


def _check_folder(settings: TrainSettings, out: Path, *, resume: bool) -> None:
    """Check that the folder may be used."""
    if not resume:
        check_new_place(out)
        return
    check_begun(out)
    stored = TrainSettings.merge(read_toml(out / ARGS_FILE))
    if difference := stored.difference(settings):
        raise SpecError(f"{out}: cannot resume with other settings: {difference}; use another --out")


def _skipped_text(inputs: TrainingInputs) -> str:
    """Return the list of the images that were left out, one a line."""
    return "".join(f"{' '.join(reason.split())}\n" for reason in inputs.skipped)


def _check_skipped(inputs: TrainingInputs, out: Path) -> None:
    """Check that a resumed run leaves out the images that it left out when it began."""
    path = out / SKIPPED_FILE
    before = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    now = _skipped_text(inputs).splitlines()
    if [line.partition(": ")[0] for line in before] != [line.partition(": ")[0] for line in now]:
        raise SpecError(
            f"{out}: {len(before)} damaged images were left out when the run began, now it would be {len(now)}, others "
            f"than in {SKIPPED_FILE}: it cannot go on with other images; bring those back, or use another --out"
        )


def _spelled_as_stored(settings: TrainSettings, out: Path) -> TrainSettings:
    """Return settings with data and weights spelled as when the run began, so that it ends with the same bytes.

    Raises:
        SpecError: The data are not there.
    """
    stored = TrainSettings.merge(read_toml(out / ARGS_FILE))
    if missing_data(stored.data) is None:
        return settings.changed(data=stored.data, weights=stored.weights)
    if missing := missing_data(settings.data):
        raise SpecError(f"{out}: its data {missing}: put the data there, or a symbolic link to them")
    return settings


def _validation(row: EpochRow | None) -> Validation | None:
    """Return an epoch's validation results; None where nothing was validated."""
    if row is None or math.isnan(row.val_accuracy):
        return None
    return Validation(accuracy=row.val_accuracy, loss=row.val_loss)


def _chosen(result: PhasesResult) -> ChosenEpoch:
    return ChosenEpoch(
        phase=result.phase,
        epoch=result.best.epoch,
        epochs=result.epochs,
        lr=result.pace.lr,
        lr_reason=result.pace.reason,
        start=_validation(result.start),
        first_start=_validation(result.first_start),
    )


def _write_reports(out: Path, result: PhasesResult) -> None:
    """Write history, plots and the pruning report."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(EpochRow.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in result.history)
    write_atomically(out / "history.csv", text.getvalue().encode())
    plot_curves(result.history, out / "curves.png")
    if result.report is not None:
        write_atomically(out / "pruning.json", to_json(result.report.to_json()).encode())
        plot_pruning(result.report, out / "pruning.png")
