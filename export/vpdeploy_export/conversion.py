"""From a bundle to another target's files: write aside, compare, and only then put in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from vpdeploy.errors import BundleError, ParityError, SpecError
from vpdeploy.files import describe_error, replacing_folder, sha256_of_file, storage_reason
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.bundle import Bundle, is_bundle
from vpdeploy.format.document import Document, to_json
from vpdeploy.session.session import Session
from vpdeploy.text import shell_path
from vpdeploy_export.images import GateImages, images_without_run
from vpdeploy_export.parity import Expectation, ParityReport, compare
from vpdeploy_export.precision.twins import CPU_RUNTIME, open_wide
from vpdeploy_export.targets import TARGETS
from vpdeploy_export.targets.target import Conversion, TargetOptions, Written

CARD_FILE = "tasks.json"
FORMAT = "vpdeploy.conversion"
FORMAT_VERSION = 1
IMAGES_PER_TASK = 8


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What a conversion wrote.

    Attributes:
        path: The folder.
        target: The target's name.
        size_bytes: Of all files.
        parity: How far each task is from the bundle.
        source: Where the compared images come from.
        next_step: A command or a file to read, for people.
    """

    path: Path
    target: str
    size_bytes: int
    parity: tuple[ParityReport, ...]
    source: str
    next_step: str

    def to_fields(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "path": str(self.path),
            "target": self.target,
            "size_bytes": self.size_bytes,
            "parity": _parity_fields(self.parity),
        }


def convert(
    path: Path, out: Path, *, target: str, options: TargetOptions | None = None, images: Path | None = None
) -> ConversionReport:
    """Write a bundle in a target's form.

    Args:
        path: The bundle.
        out: The folder; for ``triton`` the model repository. What an earlier conversion wrote there is replaced.
        target: A name in ``TARGETS``.
        options: Of single targets; None takes their defaults.
        images: A folder of images to compare on; None takes synthetic ones.

    Returns:
        What was written, with the comparison of every task.

    Raises:
        SpecError: There is no such target, or an option does not fit.
        BundleError: The bundle cannot be read, or ``out`` holds something else.
        BackendError: The target cannot be made here.
        ParityError: The result does not answer as the bundle does; nothing is written.

    Example:
        >>> report = vpdeploy_export.convert(bundle, Path("adapters"), target="onnx-adapter")
        >>> sorted(file.name for file in report.path.glob("*.onnx_adapter"))
        ['birds.onnx_adapter', 'flowers.onnx_adapter', 'probe.onnx_adapter']
    """
    options = options or TargetOptions()
    chosen = TARGETS.get(target)
    if chosen is None:
        raise SpecError(f"--to '{target}': choose one of {', '.join(TARGETS)}")
    if superfluous := [name for name in options.given if name not in chosen.takes]:
        takes = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(chosen.takes)) or "none of its kind"
        raise SpecError(f"--{superfluous[0].replace('_', '-')} means nothing to {target}; it takes {takes}")
    if path.is_file() and path.suffix == ".onnx":
        raise BundleError(f"{path}: a file, expected a bundle folder; a folded model runs in any ONNX runtime as it is")
    artifact = Artifact.of_bundle(Bundle.open(path))
    chosen.check(artifact, options)
    destination = chosen.destination(path, out, options)
    _require_replaceable(destination, target)
    if not artifact.tasks:
        raise SpecError(f"{path}: holds no task; add one with vpdeploy task add")
    compared = _compared_images(artifact, images)
    with TemporaryDirectory(prefix="vpdeploy-convert-") as scratch:
        with _reference(artifact, scratch) as session:
            expectations = Expectation.of_session(session, compared)
        conversion = Conversion(
            artifact=artifact, prompt_sets=artifact.read_prompt_sets(), options=options, scratch=Path(scratch)
        )
        try:
            with replacing_folder(destination.resolve()) as folder:
                written = chosen.write(conversion, folder)
                reports = compare(written.answerer, expectations, tolerance=written.tolerance)
                _require_closeness(reports, target)
                card = _card(artifact, target, written, reports, _files(folder))
                (folder / CARD_FILE).write_text(to_json(card), encoding="utf-8")
        except OSError as error:
            reason = storage_reason(error) or describe_error(error)
            raise BundleError(f"{destination}: cannot be written, {reason}; it is as it was before") from error
    return ConversionReport(
        path=destination,
        target=target,
        size_bytes=sum(file.stat().st_size for file in destination.rglob("*") if file.is_file()),
        parity=tuple(reports),
        source=compared.source,
        next_step=written.next_step.format(out=shell_path(out), path=shell_path(destination)),
    )


def _reference(artifact: Artifact, scratch: str) -> Session:
    """Open the bundle on the CPU; a bfloat16 graph, for which the CPU has no kernels, as float32."""
    if artifact.precision == "bf16":
        return Session(artifact, open_wide(artifact.graph_path, Path(scratch)))
    return Session.of(artifact, runtime=CPU_RUNTIME, threads=torch.get_num_threads())


def _compared_images(artifact: Artifact, folder: Path | None) -> GateImages:
    """Return the images that every task is compared on, spread over those there are."""
    found = images_without_run(artifact.preprocessing, folder)
    step = max(1, len(found.pixels) // IMAGES_PER_TASK)
    pixels = found.pixels[::step][:IMAGES_PER_TASK]
    return GateImages(pixels=pixels, source=f"{len(pixels)} of {found.source}")


def _require_closeness(reports: Sequence[ParityReport], target: str) -> None:
    """Raise unless the converted model answers every task as the bundle does.

    Raises:
        ParityError: Names the first task that it does not, with both figures.
    """
    for each in reports:
        if not each.passed:
            raise ParityError(
                f"task '{each.task}': the model converted to {target} {each.describe('the bundle')}; "
                "nothing was written; try another version of onnxruntime, or export the bundle again"
            )


def _parity_fields(reports: Sequence[ParityReport]) -> dict[str, dict[str, Any]]:
    """Return what ``tasks.json`` tells of each task's comparison, by task."""
    told = ("images", "max_abs_difference", "allowed_difference", "source")
    return {each.task: {name: each.to_fields()[name] for name in told} for each in reports}


def _card(
    artifact: Artifact, target: str, written: Written, reports: Sequence[ParityReport], files: dict[str, Path]
) -> dict[str, Any]:
    """Return ``tasks.json``: what a client has to know, and the sha256 of every other file."""
    parity = _parity_fields(reports)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "target": target,
        "graph": {
            **written.graph,
            "precision": artifact.precision,
            "opset": artifact.opset,
            "converted_from_sha256": artifact.sha256,
        },
        "preprocessing": artifact.preprocessing.to_fields(),
        "tasks": {name: {**facts, "parity": parity[name]} for name, facts in written.tasks.items()},
        "files": {name: sha256_of_file(file) for name, file in files.items()},
    }


def _require_replaceable(path: Path, target: str) -> None:
    """Refuse to write over anything but an earlier conversion to the same target.

    Raises:
        BundleError: ``path`` is a file, another folder, or holds files that no conversion wrote.
    """
    advice = "give another --out or remove it"
    if path.is_file():
        raise BundleError(f"{path}: is a file, expected the name of a folder; {advice}")
    if not path.is_dir():
        return
    if Path.cwd().is_relative_to(path.resolve()):
        raise BundleError(f"{path}: holds the current folder, which cannot be replaced; give another --out")
    if not any(path.iterdir()):
        return
    if is_bundle(path) or not (path / CARD_FILE).is_file():
        raise BundleError(f"{path}: exists and was not written by vpdeploy convert; {advice}")
    card = Document.read(path / CARD_FILE)
    card.expect_format(FORMAT, FORMAT_VERSION)
    if (found := card.take("target", str)) != target:
        raise BundleError(f"{path}: holds a conversion to {found}, not to {target}; {advice}")
    known = {CARD_FILE, *card.take("files", dict)}
    if foreign := sorted(set(_files(path)) - known):
        raise BundleError(f"{path}: holds {foreign[0]}, which vpdeploy convert did not write; {advice}")


def _files(folder: Path) -> dict[str, Path]:
    """Return all files below a folder by their relative names."""
    return {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
