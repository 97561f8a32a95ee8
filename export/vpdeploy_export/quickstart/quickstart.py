"""The quickstart: what it trains, and its steps from real images to a table of results."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image

from vpdeploy import load
from vpdeploy.bench.mixes import ONE
from vpdeploy.bench.rounds import Budget, Contest, measure, summarise_latency
from vpdeploy.bench.subject import Cell
from vpdeploy.errors import SpecError
from vpdeploy.format.manifest import GRAPH_FILE
from vpdeploy.session.session import Session
from vpdeploy.text import align, column_widths
from vpdeploy_export.export import export_model
from vpdeploy_export.forms import Folded, Switchable
from vpdeploy_export.models import TrainedModel
from vpdeploy_export.quickstart.client import ServedAnswer, ask_together, serving
from vpdeploy_export.quickstart.training import train_quietly
from vpdeploy_train.backbone import Backbone, load_backbone
from vpdeploy_train.batches import Batches
from vpdeploy_train.cost import macs_as_prefix, macs_as_tokens
from vpdeploy_train.data import DataSource, Example, ImageDataset, resolve_data
from vpdeploy_train.data.example import Record
from vpdeploy_train.evaluation import evaluate
from vpdeploy_train.footprint import shape_of
from vpdeploy_train.head import fit_head
from vpdeploy_train.methods.method import NoPrompts
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.pruning.scores import prunable_method
from vpdeploy_train.run import Run
from vpdeploy_train.settings import TrainSettings

Say = Callable[[str], None]

_LATENCY_RUNS = 30
_IMAGES_PER_TASK = 4


@dataclass(frozen=True, kw_only=True)
class PlannedTask:
    """One task of the quickstart.

    Attributes:
        name: The task's name.
        settings: How it is trained.
        about: What it asks, in a few words.
    """

    name: str
    settings: TrainSettings
    about: str


def _settings(data: str, *, epochs: int, prune: bool = False) -> TrainSettings:
    """Return settings that reach a good accuracy in few epochs on a CPU.

    The classifier starts at the linear probe and moves slowly; the prompts, which start at random, move fast.
    """
    return TrainSettings.of(
        data=data,
        method="e2vpt",
        prompt_tokens=8,
        kv_tokens=4,
        prompt_dropout=0.0,
        epochs=epochs,
        batch_size=32,
        lr=3.2,
        device="cpu",
        prune=prune,
        keep="0.5",
        score_images=320,
        prune_slack=0.02,
    )


PLAN: Final = (
    PlannedTask(name="digit", about="which digit", settings=_settings("digits", epochs=5)),
    PlannedTask(name="parity", about="even or odd digit", settings=_settings("digits:parity", epochs=3, prune=True)),
    PlannedTask(name="location", about="where the shape lies", settings=_settings("shapes:location", epochs=2)),
)
"""Three tasks on one backbone; the second is pruned and rewound."""


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One row of the table.

    Attributes:
        name: The task.
        about: What it asks.
        accuracy: On the test images, which training never saw, in [0, 1].
        probe_accuracy: Of logistic regression on the frozen features.
        prompts: Prompts kept over prompts begun with, both counted in all blocks.
        size_bytes: Compiled.
        latency_ms: One image through the session, median.
        extra_macs_as_tokens: What its prompts would add to the plain model's cost as tokens, as a share.
        extra_macs_folded: What they add folded; negative: cheaper than the plain model.
    """

    name: str
    about: str
    accuracy: float
    probe_accuracy: float
    prompts: tuple[int, int]
    size_bytes: int
    latency_ms: float
    extra_macs_as_tokens: float
    extra_macs_folded: float


@dataclass(frozen=True, kw_only=True)
class QuickstartResult:
    """What the quickstart did.

    Attributes:
        rows: One for each task.
        answers: The server's answers to one mixed batch.
        right: How many of them were right.
        seconds: In all.
        bundle: The bundle folder.
        folded: The folded fp16 file.
    """

    rows: tuple[TaskResult, ...]
    answers: tuple[ServedAnswer, ...]
    right: int
    seconds: float
    bundle: Path
    folded: Path

    def to_fields(self) -> dict[str, Any]:
        """Return the JSON form, as ``vpdeploy quickstart --json`` prints it."""
        return {
            "tasks": [
                {**asdict(row), "prompts": {"kept": row.prompts[0], "begun": row.prompts[1]}} for row in self.rows
            ],
            "served": {"images": len(self.answers), "right": self.right},
            "seconds": round(self.seconds, 1),
            "bundle": str(self.bundle),
            "folded": str(self.folded),
        }


def run_quickstart(folder: Path, say: Say) -> QuickstartResult:
    """Train three tasks on one frozen backbone, prune one, export, serve, and ask the server.

    Args:
        folder: Where all files go.
        say: Told what is being done.

    Raises:
        VpdeployError: A step failed.
    """
    started = time.perf_counter()
    backbone = load_backbone(PLAN[0].settings.backbone)
    runs: list[Run] = []
    for number, task in enumerate(PLAN, start=1):
        steps = "train, prune and rewind" if task.settings.prunes else "train"
        say(f"[{number}/{len(PLAN) + 2}] {task.name} ({task.about}, {task.settings.data}): {steps}")
        out = folder / "runs" / task.name
        train_quietly(task.settings, out, backbone=backbone, say=say)
        runs.append(Run.read(out))
    say(f"[{len(PLAN) + 1}/{len(PLAN) + 2}] export a bundle, and one task folded to float16; compare both with PyTorch")
    bundle, folded = folder / "zoo", folder / f"{runs[0].card.name}.onnx"
    models = TrainedModel.of_runs(runs)
    report = export_model(models, bundle, target=Switchable())
    export_model(models[:1], folded, target=Folded(), precision="fp16")
    say(f"[{len(PLAN) + 2}/{len(PLAN) + 2}] serve the bundle and ask all tasks at once")
    sources = [resolve_data(task.settings.data, seed=task.settings.seed) for task in PLAN]
    questions = [
        (task.name, example, source.labels[example.label])
        for task, source in zip(PLAN, sources, strict=True)
        for example in source.test[:_IMAGES_PER_TASK]
    ]
    with serving(bundle) as address:
        answers = ask_together(address, [(name, _png(example)) for name, example, _ in questions])
    right = sum(answer.label == label for answer, (_, _, label) in zip(answers, questions, strict=True))
    with load(bundle, threads=torch.get_num_threads()) as session:
        rows = [
            _measure(task, run, source, backbone, session, report.prompt_bytes[task.name])
            for task, run, source in zip(PLAN, runs, sources, strict=True)
        ]
    return QuickstartResult(
        rows=tuple(rows),
        answers=tuple(answers),
        right=right,
        seconds=time.perf_counter() - started,
        bundle=bundle,
        folded=folded,
    )


def render_table(result: QuickstartResult) -> str:
    """Return the table and the summary lines."""
    header = ("task", "accuracy", "linear probe", "prompts kept", "kB/task", "ms/image", "as tokens", "folded")
    rows = [
        (
            row.name,
            f"{row.accuracy:.1%}",
            f"{row.probe_accuracy:.1%}",
            f"{row.prompts[0]} of {row.prompts[1]}",
            f"{row.size_bytes / 1000:.0f}",
            f"{row.latency_ms:.1f}",
            f"{row.extra_macs_as_tokens:+.1%}",
            f"{row.extra_macs_folded:+.1%}",
        )
        for row in result.rows
    ]
    rule = ["-" * width for width in column_widths([header, *rows])]
    lines = align([header, rule, *rows])
    graph_kb = (result.bundle / GRAPH_FILE).stat().st_size / 1000
    added_kb = sum(row.size_bytes for row in result.rows) / 1000
    lines += [
        "",
        "accuracy: on test images that training never saw. as tokens / folded: multiply-accumulates against the plain,",
        "prompt-free model, with prompts as tokens and as vpdeploy deploys them.",
        f"{len(result.rows)} tasks share one graph of {graph_kb:.0f} kB and add {added_kb:.0f} kB. The server answered",
        f"{len(result.answers)} images of {len(result.rows)} tasks at once, {result.right} of them right. "
        f"{result.seconds:.0f} s in all.",
    ]
    return "\n".join(lines)


def _measure(
    task: PlannedTask, run: Run, source: DataSource, backbone: Backbone, session: Session, size_bytes: int
) -> TaskResult:
    """Fill one row: test accuracy, the linear probe, latency, and the cost of the prompts."""
    model = run.load_model(backbone)

    def batches(examples: tuple[Example, ...]) -> Batches:
        dataset = ImageDataset(examples, run.card.preprocessing)
        return Batches(dataset=dataset, preprocessing=run.card.preprocessing, batch_size=64, device=torch.device("cpu"))

    test = batches(source.test)
    probe = PromptedViT(backbone.vit, NoPrompts(), len(run.card.labels))
    fit_head(probe, batches(source.train))
    lengths, chosen = _prefix_lengths(model), task.settings.to_fields()
    begun = chosen["prompt_tokens"] + chosen["kv_tokens"]
    shape = shape_of(backbone.trunk, len(run.card.labels))
    if shape is None:
        raise SpecError("the cost of this backbone cannot be counted: its blocks are of several sizes")
    plain = macs_as_tokens(shape, 0)
    return TaskResult(
        name=task.name,
        about=task.about,
        accuracy=evaluate(model, test).accuracy,
        probe_accuracy=evaluate(probe, test).accuracy,
        prompts=(sum(lengths), begun * len(lengths)),
        size_bytes=size_bytes,
        latency_ms=_latency_ms(session, task.name),
        extra_macs_as_tokens=macs_as_tokens(shape, chosen["prompt_tokens"]) / plain - 1,
        extra_macs_folded=macs_as_prefix(shape, lengths) / plain - 1,
    )


def _prefix_lengths(model: PromptedViT) -> list[int]:
    """Return the prompts of each block, visual and key/value."""
    kept = prunable_method(model).kept
    return [len(tokens) + len(kv_tokens) for tokens, kv_tokens in zip(kept.tokens, kept.kv_tokens, strict=True)]


def _latency_ms(session: Session, task: str) -> float:
    """Return the median time of one image through the session."""
    size = session.preprocessing.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), dtype=np.uint8)
    with session.lease(task) as lease:
        slots = np.array([lease.slot], dtype=np.int32)
        contest = Contest(cell=Cell(batch=1, mix=ONE), runs=[lambda: session.run(pixels, slots)])
        if not measure([contest], Budget(duration_s=None, count=_LATENCY_RUNS), warm_up=0):
            raise KeyboardInterrupt
    return summarise_latency(contest.seconds(0)).p50


def _png(example: Example) -> bytes:
    """Return an example as an encoded image, as a client would send it."""
    if isinstance(example.source, Path):
        return example.source.read_bytes()
    if isinstance(example.source, Record):
        return example.source.read()
    stream = io.BytesIO()
    Image.fromarray(example.source).save(stream, format="PNG")
    return stream.getvalue()
