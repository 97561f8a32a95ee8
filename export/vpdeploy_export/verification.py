"""The parity gate once more: any images, any runtimes, against trained models or against the graph's own float32."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch

from vpdeploy.backends import AUTO, open_backend
from vpdeploy.backends.protocol import Backend
from vpdeploy.errors import BackendError, LayoutMismatchError, ParityError, SpecError
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.task import TaskCard
from vpdeploy.session.session import Session
from vpdeploy.text import differing, shell_path
from vpdeploy_export.images import folder_images, synthetic_images
from vpdeploy_export.models import TrainedModel
from vpdeploy_export.parity import TOLERANCES, Expectation, ParityReport, SessionAnswerer, compare
from vpdeploy_export.precision.bisection import Bisection, bisect
from vpdeploy_export.precision.twins import open_rounded, open_wide

EMULATED: Final = "emulated"
"""Stands for a runtime: ONNX Runtime on the CPU, every value rounded to the graph's precision."""


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What a verification found.

    Attributes:
        path: The bundle or the folded file.
        reference: What the answers were compared with.
        parity: One report for each runtime and task.
        bisection: Where the precision leaves tolerance, if that was asked.
    """

    path: Path
    reference: str
    parity: tuple[ParityReport, ...]
    bisection: Bisection | None = None

    def to_fields(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "path": str(self.path),
            "reference": self.reference,
            "parity": [{"task": report.task, **report.to_fields(), "passed": report.passed} for report in self.parity],
            "bisection": None if self.bisection is None else self.bisection.to_fields(),
        }

    def require(self) -> None:
        """Raise unless every comparison passed.

        Raises:
            ParityError: Names the first that did not, and what to do.
        """
        for report in self.parity:
            if not report.passed:
                advice = (
                    f"find the layer with vpdeploy verify {shell_path(self.path)} --bisect"
                    if self.bisection is None
                    else self.bisection.describe()
                )
                raise ParityError(
                    f"task '{report.task}' on {report.runtime} {report.describe(self.reference)}; {advice}"
                )


def verify(
    path: Path,
    *,
    models: Sequence[TrainedModel] = (),
    images: Path | None = None,
    runtimes: Sequence[str] = (),
    bisects: bool = False,
) -> VerifyReport:
    """Compare what an artifact answers with what it should, the tasks mixed in every batch.

    Args:
        path: A bundle folder or a folded ONNX file.
        models: Trained models to compare with; without any, the graph's own arithmetic in float32 is the reference.
        images: A folder of images; None takes the models' own, else synthetic ones.
        runtimes: Names in ``vpdeploy.backends.RUNTIMES``, ``auto`` or ``emulated``; empty is ``auto``.
        bisects: Also find the first value that leaves the tolerance.

    Returns:
        The comparisons, passed or not.

    Raises:
        BundleError: The artifact or a run cannot be read.
        SpecError: A runtime or a model does not belong to the artifact, or the images cannot be used.
        LayoutMismatchError: A model has another backbone, preprocessing or other labels than the artifact's task.
        BackendError: A runtime that was asked for does not work here.

    Example:
        >>> report = vpdeploy_export.verify(bundle, models=[vpdeploy_export.TrainedModel.of_run(flowers_run)])
        >>> [(each.task, each.passed) for each in report.parity]
        [('flowers', True)]
    """
    artifact = Artifact.open(path)
    if not artifact.tasks:
        raise SpecError(f"{path}: holds no task to verify; add one with vpdeploy task add")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="vpdeploy-verify-")))
        # Opened before anything is computed: a runtime that does not work here is told at once.
        backends = [_open(artifact, name, folder, stack) for name in dict.fromkeys(runtimes or (AUTO,))]
        if models:
            reference = "the trained model"
            expectations = _trained(artifact, models, images=images)
        else:
            reference = "its own arithmetic in float32"
            expectations = _own(artifact, images=images, folder=folder)
        compared = artifact
        if artifact.is_switchable:
            compared = artifact.with_prompt_sets([artifact.read_prompt_set(each.task) for each in expectations])
        reports: list[ParityReport] = []
        for backend in backends:
            answerer = SessionAnswerer(session=Session(compared, backend))
            reports += compare(answerer, expectations, tolerance=TOLERANCES[artifact.precision].exported)
        found = bisect(compared, expectations) if bisects else None
    return VerifyReport(path=path, reference=reference, parity=tuple(reports), bisection=found)


def _open(artifact: Artifact, runtime: str, folder: Path, stack: ExitStack) -> Backend:
    if runtime != EMULATED:
        try:
            backend = open_backend(artifact, runtime=runtime, threads=torch.get_num_threads())
        except BackendError as error:
            if runtime != AUTO or artifact.precision == "fp32":
                raise
            raise BackendError(f"{error}; compare on the CPU with --runtime {EMULATED}") from error
    elif artifact.precision == "fp32":
        raise SpecError(f"--runtime {EMULATED}: {artifact.path} is float32, which nothing has to stand in for")
    else:
        backend = open_rounded(artifact.graph_path, artifact.precision, folder)
    stack.callback(backend.close)
    return backend


def _trained(artifact: Artifact, models: Sequence[TrainedModel], *, images: Path | None) -> list[Expectation]:
    """Return what trained models answer."""
    cards = artifact.cards
    expectations: list[Expectation] = []
    for model in models:
        name = model.card.name
        if name not in cards:
            raise SpecError(f"{model.origin}: task '{name}' is not in {artifact.path}; it holds: {', '.join(cards)}")
        if name in {each.task for each in expectations}:
            raise SpecError(f"{model.origin}: a run of task '{name}' was given already; name each task once")
        _require_same(model, cards[name], artifact)
        expectations.append(Expectation.of_model(model.load(), model.card, model.images(images)))
    return expectations


def _require_same(model: TrainedModel, card: TaskCard, artifact: Artifact) -> None:
    """Refuse a model that cannot be the one the artifact's task was made from."""
    if model.card.backbone.sha256 != card.backbone.sha256:
        mine, other = differing(model.card.backbone.sha256, card.backbone.sha256)
        raise LayoutMismatchError(
            f"{model.origin}: has backbone {model.card.backbone.name} ({mine}), "
            f"{artifact.path} {card.backbone.name} ({other}); give the run that was exported"
        )
    if difference := model.card.preprocessing.difference(artifact.preprocessing):
        raise LayoutMismatchError(
            f"{model.origin}: preprocesses unlike {artifact.path}: {difference}; give the run that was exported"
        )
    if model.card.labels != card.labels:
        raise LayoutMismatchError(
            f"{model.origin}: task '{card.name}' has {len(model.card.labels)} labels that are not the "
            f"{len(card.labels)} of {artifact.path}; give the run that was exported"
        )


def _own(artifact: Artifact, *, images: Path | None, folder: Path) -> list[Expectation]:
    """Return what the graph answers with its arithmetic in float32."""
    if images is None:
        chosen = synthetic_images(artifact.preprocessing, "give real ones with --images or --run")
    else:
        chosen = folder_images(images, artifact.preprocessing)
    with Session(artifact, open_wide(artifact.graph_path, folder)) as session:
        return Expectation.of_session(session, chosen)
