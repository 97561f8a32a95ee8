"""A training run from settings to a finished run folder: train, prune, rewind, choose, write."""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from lightning_fabric import Fabric

from vpdeploy.document import to_json
from vpdeploy.errors import SpecError
from vpdeploy.files import write_atomically
from vpdeploy.preprocessing import Preprocessing
from vpdeploy.task import TaskCard
from vpdeploy_train.backbone import Backbone, load_backbone
from vpdeploy_train.batches import Batches
from vpdeploy_train.data import DataSource, ImageDataset, build_augmentation, check_images, resolve_data
from vpdeploy_train.device import choose_device, deterministic, make_fabric
from vpdeploy_train.head import fit_head
from vpdeploy_train.loop import fit, phase_seed
from vpdeploy_train.methods import MethodOptions, PromptMethod, method_named
from vpdeploy_train.plots import plot_curves, plot_pruning
from vpdeploy_train.progress import ConsoleProgress, Progress
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.pruning.scores import prunable_method, score_prompts
from vpdeploy_train.pruning.search import Candidate, PruningReport, choose, kept_for, report_of
from vpdeploy_train.run import Run, prompt_dimensions
from vpdeploy_train.settings import TrainSettings, read_toml
from vpdeploy_train.state import EpochRow, PhaseState, StateFolder

logger = logging.getLogger("vpdeploy.train")

ARGS_FILE = "args.toml"
STATE_FOLDER = "state"

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

MakeProgress = Callable[[str, int, int], Progress]


def console_progress(title: str, images: int, done: int) -> Progress:
    """Return a progress bar for a phase of so many images, of which some are done."""
    return ConsoleProgress(title, images=images, done=done)


@dataclass(frozen=True, kw_only=True)
class _Workbench:
    """What every phase of one run shares."""

    settings: TrainSettings
    backbone: Backbone
    labels: tuple[str, ...]
    train: Batches
    val: Batches
    scoring: Batches
    fabric: Fabric
    states: StateFolder
    make_progress: MakeProgress


def train_run(
    settings: TrainSettings,
    out: Path,
    *,
    resume: bool = False,
    name: str | None = None,
    make_progress: MakeProgress = console_progress,
    backbone: Backbone | None = None,
) -> Run:
    """Train one task and write its run folder.

    A run that is interrupted at any moment can be resumed; it loses at most the current epoch and ends with the same
    bytes as an uninterrupted one.

    Args:
        settings: What to do.
        out: The run folder.
        resume: Continue an interrupted run in ``out``.
        name: The task's name; None takes the folder's.
        make_progress: Makes the progress display of each phase.
        backbone: The loaded backbone, where the caller trains several tasks on it.

    Raises:
        SpecError: Settings, data or folder do not fit.
        InputError: Images cannot be decoded.
        TrainingError: The loss is not finite, or the stored state is damaged.
    """
    _check_folder(settings, out, resume=resume)
    device = choose_device(settings.device)
    data = resolve_data(settings.data, seed=settings.seed, val_fraction=settings.val_fraction)
    check_images([*data.train, *data.val])
    if backbone is None:
        weights = None if settings.weights is None else Path(settings.weights)
        backbone = load_backbone(settings.backbone, weights=weights, image_size=settings.image_size)
    preprocessing = make_preprocessing(settings, backbone)
    with deterministic(device):
        bench = _make_workbench(settings, backbone, data, preprocessing, device, out, make_progress)
        method = method_named(settings.method)
        if settings.prunes and not method.prunable:
            raise SpecError(f"--prune: method '{settings.method}' has no prompts to prune; use --no-prune")
        if not resume:  # noted only now: a folder that was refused can be used with corrected settings
            write_atomically(out / ARGS_FILE, settings.to_toml().encode())
        result = _run_phases(bench)
    method_module = result.model.method
    card = TaskCard(
        name=name or task_name_for(out),
        labels=data.labels,
        method=settings.method,
        backbone=backbone.identity,
        preprocessing=preprocessing,
        details={
            "hyperparameters": {key: value for key, value in asdict(settings).items() if value is not None},
            "images": {"train": len(data.train), "val": len(data.val), "test": len(data.test)},
            "metrics": {"val_accuracy": result.best.val_accuracy, "val_loss": result.best.val_loss},
            "prompts": method_module.summary(),
            "pruning": None if result.report is None else result.report.to_fields(),
        },
    )
    run = Run(
        path=out,
        card=card,
        structure=method_module.structure(),
        state=result.model.trained_state(),
        data=settings.data,
        data_seed=settings.seed,
        val_fraction=settings.val_fraction,
        weights=None if settings.weights is None else str(Path(settings.weights).resolve()),
    )
    _write_reports(out, result)
    run.write()
    return run


@dataclass(frozen=True, kw_only=True)
class _Result:
    model: PromptedViT
    best: EpochRow
    history: list[EpochRow]
    report: PruningReport | None


def _run_phases(bench: _Workbench) -> _Result:
    """Train, and where asked for, score, prune, rewind and choose."""
    settings = bench.settings
    unpruned = _new_model(bench, _new_method(bench, settings.seed))
    if settings.head == "probe":
        fit_head(unpruned, bench.scoring)
    initial = {key: value.clone() for key, value in unpruned.trained_state().items()}
    state = _run_phase(bench, "train", unpruned)
    history = list(state.history)
    if not settings.prunes:
        return _Result(model=unpruned, best=state.best_row, history=history, report=None)
    scores = score_prompts(unpruned, _scoring_sample(bench), scope=settings.prune_scope)
    candidates = [Candidate.of("train", unpruned, state.best_row, keep=1.0, keep_segments=1.0)]
    for number, (keep, keep_segments) in enumerate(settings.keep_ratios(), start=1):
        phase = f"prune-{number}"
        kept = kept_for(
            unpruned, scores, _scoring_sample(bench), keep=keep, keep_segments=keep_segments, scope=settings.prune_scope
        )
        start = initial if settings.rewind == "initial" else _fresh_state(bench, phase)
        method = prunable_method(unpruned).pruned_to(kept, _without_prefix(start, "method."))
        model = _new_model(bench, method)
        model.head.load_state_dict(_without_prefix(start, "head."))
        if settings.rewind == "fresh" and settings.head == "probe":
            fit_head(model, bench.scoring)
        state = _run_phase(bench, phase, model)
        history += state.history
        candidates.append(Candidate.of(phase, model, state.best_row, keep=keep, keep_segments=keep_segments))
    chosen = choose(candidates, slack=settings.prune_slack)
    report = report_of(candidates, chosen, scores, scope=settings.prune_scope)
    return _Result(model=chosen.model, best=chosen.best, history=history, report=report)


def _run_phase(bench: _Workbench, phase: str, model: PromptedViT) -> PhaseState:
    """Bring one phase to its end, from its stored state if there is one."""
    state = bench.states.read(phase)
    if state.finished:
        model.load_trained_state(state.best)
        return state
    images = len(bench.train.dataset)
    with bench.make_progress(phase, images * bench.settings.epochs, images * len(state.history)) as progress:
        return fit(
            model,
            bench.train,
            bench.val,
            phase=phase,
            state=state,
            settings=bench.settings,
            fabric=bench.fabric,
            progress=progress,
            store=lambda state: bench.states.write(phase, state),
        )


def make_preprocessing(settings: TrainSettings, backbone: Backbone) -> Preprocessing:
    """Return how images reach the backbone under the given settings."""
    mean, std = (backbone.mean, backbone.std) if settings.normalisation == "backbone" else _IMAGENET
    crop_ratio = backbone.crop_ratio if settings.resize == "crop" else 1.0
    return Preprocessing(
        image_size=backbone.image_size, mean=mean, std=std, resize=settings.resize, crop_ratio=crop_ratio
    )


def task_name_for(out: Path) -> str:
    """Return a task name made of a run folder's name."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", out.resolve().name).lstrip("._-")[:64]
    return name or "task"


def _check_folder(settings: TrainSettings, out: Path, *, resume: bool) -> None:
    """Check that the folder may be used."""
    args = out / ARGS_FILE
    if resume:
        if not args.is_file():
            raise SpecError(f"{out}: nothing to resume, {ARGS_FILE} is missing; start without --resume")
        stored = TrainSettings.merge(read_toml(args))
        if difference := stored.difference(settings):
            raise SpecError(f"{out}: cannot resume with other settings: {difference}; use another --out")
        return
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise SpecError(f"{out}: exists and is not empty; continue it with --resume, or give another --out")


def _make_workbench(
    settings: TrainSettings,
    backbone: Backbone,
    data: DataSource,
    preprocessing: Preprocessing,
    device: torch.device,
    out: Path,
    make_progress: MakeProgress,
) -> _Workbench:
    augmentation = build_augmentation(settings.augment or data.augmentation, preprocessing)

    def batches(dataset: ImageDataset) -> Batches:
        return Batches(
            dataset=dataset,
            preprocessing=preprocessing,
            batch_size=settings.batch_size,
            device=device,
            workers=settings.workers,
        )

    backbone.vit.to(device)
    train = batches(ImageDataset(data.train, preprocessing, augmentation, settings.seed))
    scoring = train if augmentation is None else batches(ImageDataset(data.train, preprocessing))
    val = batches(ImageDataset(data.val, preprocessing))
    for each in (train, val):
        each.dataset.preload()
    return _Workbench(
        settings=settings,
        backbone=backbone,
        labels=data.labels,
        train=train,
        val=val,
        scoring=scoring,
        fabric=make_fabric(settings.precision, device),
        states=StateFolder(out / STATE_FOLDER),
        make_progress=make_progress,
    )


def _new_method(bench: _Workbench, seed: int) -> PromptMethod:
    options = MethodOptions(
        prompt_tokens=bench.settings.prompt_tokens,
        kv_tokens=bench.settings.kv_tokens,
        kv_shared=bench.settings.kv_shared,
        dropout=bench.settings.prompt_dropout,
        segment_order=bench.settings.segment_order,
    )
    generator = torch.Generator().manual_seed(seed)
    return method_named(bench.settings.method).create(prompt_dimensions(bench.backbone.identity), options, generator)


def _new_model(bench: _Workbench, method: PromptMethod) -> PromptedViT:
    torch.manual_seed(bench.settings.seed)
    model = PromptedViT(bench.backbone.vit, method, len(bench.labels))
    return model.to(bench.train.device)


def _fresh_state(bench: _Workbench, phase: str) -> dict[str, torch.Tensor]:
    """Return initial values other than the run's own, the same whenever the phase is run."""
    return _new_model(bench, _new_method(bench, phase_seed(bench.settings.seed, phase))).trained_state()


def _scoring_sample(bench: _Workbench) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Return training images for importance scores; folders are sorted by class, so they are drawn in random order."""
    return bench.scoring.sample(bench.settings.score_images, seed=bench.settings.seed)


def _without_prefix(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _write_reports(out: Path, result: _Result) -> None:
    """Write history, plots and the pruning report."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(EpochRow.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in result.history)
    write_atomically(out / "history.csv", text.getvalue().encode())
    plot_curves(result.history, out / "curves.png")
    if result.report is not None:
        write_atomically(out / "pruning.json", to_json(result.report.to_fields()).encode())
        plot_pruning(result.report, out / "pruning.png")
