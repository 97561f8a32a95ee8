"""What a training will take of this machine's memory, told and checked before images are read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch

from vpdeploy.errors import SpecError
from vpdeploy_train.backbone import Backbone
from vpdeploy_train.data import DataSource
from vpdeploy_train.data.loader import default_workers
from vpdeploy_train.data.memory import MEMORY_SHARE, free_memory
from vpdeploy_train.data.preload import decoding_threads
from vpdeploy_train.device import choose_device
from vpdeploy_train.head import is_regression
from vpdeploy_train.methods.method import PromptDimensions
from vpdeploy_train.settings import TrainSettings

_GIB: Final = 1 << 30
_TOLERANCE: Final = 1.1  # estimates are good to a tenth or so
_BACKWARD: Final = 15  # numbers for each token, channel and block that a step with gradients holds; measured 15 to 18
_FORWARD: Final = 3
_DATASETS: Final = 3  # training, validation, and training images without augmentation
_REST_BYTES: Final = 128 << 20  # buffers of matrix products, what a second module loads
_THREAD_BYTES: Final = 64 << 20  # an image of 12 megapixels, and its copy in another mode
_WORKER_BYTES: Final = 64 << 20  # the decoder's and torch's own
_EXAMPLE_BYTES: Final = 1 << 10  # a path and its label, which a forked worker copies when it first counts references


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The sizes that memory depends on.

    Attributes:
        images: Training images, N.
        classes: C.
        width: Width of the feature, D.
        batch_size: B.
        cells: Tokens × width, summed over the blocks: what one image makes of activations.
        parameters: Numbers that are trained, without the head.
        candidates: Models that are retrained beside the first one.
        head_is_probed: Whether the classifier starts at a linear probe.
        computes_here: Whether steps are computed in this machine's memory, not a GPU's.
        decoded_bytes: Of all images, decoded.
        threads: Threads that decode images before the training.
        workers: Processes that decode the images of each data set; 0 decodes in this one.
    """

    images: int
    classes: int
    width: int
    batch_size: int
    cells: int
    parameters: int
    candidates: int
    head_is_probed: bool
    computes_here: bool
    decoded_bytes: int
    threads: int
    workers: int


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What a training will take, in bytes; all but the images are estimates.

    Attributes:
        decoded_bytes: Of all images, decoded.
        cache_bytes: What decoded images may take.
        trained_bytes: Head and prompts, their gradients, the optimizer's tensors and the stored copies.
        probe_bytes: Features of the training images, and the fit of the linear probe.
        step_bytes: Activations of one step, where it is computed in this memory.
        rest_bytes: Decoding, and worker processes.
        free_bytes: What is free now.
        workers: Processes that decode the images of each data set.
    """

    decoded_bytes: int
    cache_bytes: int
    trained_bytes: int
    probe_bytes: int
    step_bytes: int
    rest_bytes: int
    free_bytes: int
    workers: int

    @classmethod
    def of(cls, work: Workload, *, cache_bytes: int | None, free_bytes: int) -> MemoryPlan:
        """Return the plan of a workload.

        Args:
            work: The sizes.
            cache_bytes: What decoded images may take; None is half of what the rest leaves free.
            free_bytes: Memory that is free now.
        """
        # Weight, gradient, two moments, three stored copies of it and two of the moments; twice what a file takes.
        numbers = work.parameters + (work.width + 1) * work.classes
        trained = 4 * numbers * (16 + 8 * work.candidates)

        # Features in float32, twice while they are joined; the fit in float64. No array is images × classes but the
        # regression's, whose sizes are bounded.
        probe = 0
        if work.head_is_probed:
            probe = 8 * work.images * work.width
            if is_regression(work.images, work.classes, work.width):
                probe += 8 * work.images * (2 * work.width + 3 * work.classes)
            else:
                probe += 8 * work.width * (3 * work.classes + 3 * work.width)

        # A step, and what runs beside it. Probe and step are not at the same time; the larger counts.
        step = 0
        if work.computes_here:
            depth = _BACKWARD if work.parameters else _FORWARD
            step = 4 * work.batch_size * (depth * work.cells + 4 * work.classes)
        rest = (
            _REST_BYTES
            + work.threads * _THREAD_BYTES
            + _DATASETS * work.workers * (_WORKER_BYTES + _EXAMPLE_BYTES * work.images)
        )
        others = trained + max(probe, step) + rest
        if cache_bytes is None:
            cache_bytes = int(MEMORY_SHARE * max(free_bytes - others, 0))
        return cls(
            decoded_bytes=work.decoded_bytes,
            cache_bytes=cache_bytes,
            trained_bytes=trained,
            probe_bytes=probe,
            step_bytes=step,
            rest_bytes=rest,
            free_bytes=free_bytes,
            workers=work.workers,
        )

    @property
    def images_bytes(self) -> int:
        """What decoded images will take."""
        return min(self.decoded_bytes, self.cache_bytes)

    @property
    def total_bytes(self) -> int:
        """What all of it takes at once: the probe is over when the first step is taken."""
        return self.images_bytes + self.trained_bytes + max(self.probe_bytes, self.step_bytes) + self.rest_bytes

    def describe(self) -> str:
        """Return the plan in one line."""
        images = f"images {_size(self.images_bytes)}"
        if self.images_bytes < self.decoded_bytes:
            by = f" by {self.workers} processes" if self.workers else ""
            images += f" of {_size(self.decoded_bytes)}, the others decoded in every epoch{by}"
        return (
            f"memory: {images}, head, prompts and optimizer {_size(self.trained_bytes)}, "
            f"linear probe {_size(self.probe_bytes)}, a step {_size(self.step_bytes)}, rest {_size(self.rest_bytes)}; "
            f"together {_size(self.total_bytes)} of the {_size(self.free_bytes)} that are free"
        )

    def require_room(self) -> None:
        """Refuse what clearly does not fit.

        Raises:
            SpecError: More is needed than is free; the message says what takes most, and what to lower.
        """
        if self.total_bytes <= _TOLERANCE * self.free_bytes:
            return
        parts = {
            "keep fewer images in memory with --cache": self.images_bytes,
            "there are many classes or trained weights: use --optimizer sgd, --no-prune or fewer classes": (
                self.trained_bytes
            ),
            "lower --batch-size or --image-size": self.step_bytes,
            "start without a probe, --head zero": self.probe_bytes,
            "lower --workers": self.rest_bytes,
        }
        advice = max(parts, key=lambda name: parts[name])
        raise SpecError(
            f"this training would take about {_size(self.total_bytes)} of memory, {_size(self.free_bytes)} are free "
            f"({self.describe().removeprefix('memory: ').partition('; ')[0]}): {advice}"
        )


def plan_training(
    settings: TrainSettings, source: DataSource, backbone: Backbone, *, decoded_bytes: int, cache_bytes: int | None
) -> MemoryPlan:
    """Return what a training will take, by what it was asked to do and what is free now.

    Args:
        settings: What it was asked to do.
        source: Its examples.
        backbone: The frozen backbone.
        decoded_bytes: Of all images that are read more than once.
        cache_bytes: What decoded images may take; None is half of what the rest leaves free.

    Raises:
        SpecError: The method does not fit the backbone, or the device is absent.
    """
    # The method's own numbers; one that owns weights and names none trains the whole backbone.
    kind = settings.kind
    method = kind.create(PromptDimensions.of(backbone.trunk), settings.options, torch.Generator())
    parameters = sum(parameter.numel() for parameter in method.parameters())
    if kind.form == "weights" and not parameters:
        parameters = sum(parameter.numel() for parameter in backbone.vit.parameters())

    # Each stage after the first has a quarter of the tokens.
    identity = backbone.identity
    tokens = (backbone.image_size // identity.patch_size) ** 2
    cells = sum(stage.depth * stage.width * max(tokens // 4**number, 1) for number, stage in enumerate(identity.stages))
    work = Workload(
        images=len(source.train),
        classes=len(source.labels),
        width=identity.width,
        batch_size=min(settings.batch_size, max(len(source.train), len(source.val))),
        cells=cells,
        parameters=parameters,
        candidates=len(settings.keep_ratios()) if settings.prunes else 0,
        head_is_probed=settings.head == "probe",
        computes_here=choose_device(settings.device).type == "cpu",
        decoded_bytes=decoded_bytes,
        threads=decoding_threads(),
        workers=settings.workers or 0,
    )

    # Images that do not fit are decoded by processes of their own, for each of three data sets.
    free_bytes = free_memory()
    plan = MemoryPlan.of(work, cache_bytes=cache_bytes, free_bytes=free_bytes)
    if settings.workers is None and plan.images_bytes < decoded_bytes:
        work = replace(work, workers=default_workers())
        plan = MemoryPlan.of(work, cache_bytes=cache_bytes, free_bytes=free_bytes)
    return plan


def _size(size_bytes: int) -> str:
    """Return a size in GiB, or in MiB where it is small."""
    return f"{size_bytes / _GIB:.1f} GiB" if size_bytes >= _GIB else f"{size_bytes / (1 << 20):.0f} MiB"
