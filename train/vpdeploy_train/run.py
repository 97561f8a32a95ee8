"""A run on disk: what training writes and evaluation and export read.

::

    run/  task.json  prompts.safetensors        the result (``Run.write``, ``Run.read``)
          backbone.safetensors                  of an imported run alone: its backbone
          args.toml  history.csv  curves.png  pruning.png  pruning.json
          skipped.txt                           images that --skip-corrupt left out; absent where there are none
          state/                                what --resume needs
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from vpdeploy.errors import BundleCorruptError, SpecError
from vpdeploy.files import replacing_file, sha256_of_file
from vpdeploy.format.document import to_json
from vpdeploy.format.run import CARD_FILE, FORMAT, FORMAT_VERSION, TENSOR_FILE, RunCard, digests_to_fields
from vpdeploy.format.task import TaskCard
from vpdeploy.text import differing
from vpdeploy_train.backbone import Backbone, load_backbone
from vpdeploy_train.data import DataSource, resolve_data
from vpdeploy_train.data.resolve import missing_data
from vpdeploy_train.methods import restore_method
from vpdeploy_train.methods.method import PromptDimensions, PromptMethod
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.settings import PoolingChoice

logger = logging.getLogger("vpdeploy.run")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trained prompt set.

    Attributes:
        path: The run folder.
        card: What is known of the task.
        structure: ``PromptMethod.structure``: what was kept, and the method's options.
        state: The trained tensors, as ``PromptedViT.trained_state`` names them.
        data: The data specification it was trained on; None for an imported run.
        data_seed: Seed of the splits that were drawn from it.
        val_fraction: Share of the training images that was held out.
        weights: The backbone's weights file, or None for timm's own; relative to the run where it lies beside it.
        pooling: Which tokens the feature is pooled over.
        digests: sha256 by name of the run's files, as they were read; empty for a run that was not, and of version 1.

    Example:
        >>> stored = vpdeploy_train.Run.read(run)
        >>> stored.card.labels
        ('blue', 'green', 'red')
        >>> model = stored.load_model(stored.load_backbone())
        >>> model.head.out_features
        3
    """

    path: Path
    card: TaskCard
    structure: Mapping[str, Any]
    state: Mapping[str, Tensor]
    data: str | None
    data_seed: int
    val_fraction: float
    weights: str | None
    pooling: PoolingChoice = "model"
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def own_weights(self) -> str | None:
        """Name of the backbone's file in the run folder; None where the backbone lies elsewhere."""
        is_beside = self.weights is not None and len(Path(self.weights).parts) == 1
        return self.weights if is_beside else None

    @property
    def pools_prompts(self) -> bool:
        """Whether the feature averages over prompt rows too."""
        return self.pooling == "published"

    def write(self) -> None:
        """Write ``prompts.safetensors`` and then ``task.json``, which makes the folder a finished run.

        Both are on the disk before the first takes its place. A card of other prompts goes before them: what a crash
        in between leaves is a run to finish, not one whose files contradict each other.

        Raises:
            OSError: The folder cannot be written, or the disk is full; what was there is as it was.
        """
        encoded = safetensors.torch.save({name: value.contiguous() for name, value in self.state.items()})
        digests = {TENSOR_FILE: hashlib.sha256(encoded).hexdigest()}
        if self.own_weights is not None and (self.path / self.own_weights).is_file():
            digests[self.own_weights] = sha256_of_file(self.path / self.own_weights)
        fields = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "files": digests_to_fields(digests),
            "task": self.card.to_fields(),
            "structure": dict(self.structure),
            "data": {"spec": self.data, "seed": self.data_seed, "val_fraction": self.val_fraction},
            "weights": self.weights,
            "pooling": self.pooling,
        }
        tensors = self.path / TENSOR_FILE
        with replacing_file(self.path / CARD_FILE) as card:
            card.write_text(to_json(fields), encoding="utf-8")
            with replacing_file(tensors) as temporary:
                temporary.write_bytes(encoded)
                if not tensors.is_file() or sha256_of_file(tensors) != digests[TENSOR_FILE]:
                    (self.path / CARD_FILE).unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path) -> Run:
        """Return the run of a folder.

        Args:
            path: The folder.

        Raises:
            BundleError: The folder is no finished run.
            BundleCorruptError: A file is damaged.
            BundleVersionError: It was written in another format version.
        """
        stored = RunCard.read(path)
        document = stored.document
        if not stored.digests:
            logger.info("note: %s was written by a former version, without digests: its files are read unchecked", path)
        data = document.nested("data")
        stored.verify(TENSOR_FILE)
        try:
            state = safetensors.torch.load_file(path / TENSOR_FILE)
        except (OSError, SafetensorError) as error:
            raise BundleCorruptError(f"{path / TENSOR_FILE}: cannot be read: {error}; train again") from error
        weights = document.fields.get("weights")
        pooling = document.fields.get("pooling", "model")
        if pooling not in get_args(PoolingChoice):
            raise BundleCorruptError(f"{document.source}: unknown pooling '{pooling}'")
        return cls(
            path=path,
            card=stored.task,
            structure=document.take("structure", dict),
            state=state,
            data=None if data.fields.get("spec") is None else data.take("spec", str),
            data_seed=data.take("seed", int),
            val_fraction=data.take("val_fraction", float),
            weights=weights if weights is None else str(weights),
            pooling=pooling,
            digests=stored.digests,
        )

    def read_data(self, spec: str | None = None) -> DataSource:
        """Return labelled images in the splits that the run was trained on, numbered by its labels.

        Args:
            spec: Other data; None takes the run's own.

        Raises:
            SpecError: The data cannot be used, or are not there any more; or the run was imported and has none.
        """
        if spec is None:
            spec = self.data
            if spec is None:
                raise SpecError(f"{self.path}: was imported, so it names no data of its own; give --data")
            if missing := missing_data(spec):
                raise SpecError(f"{self.path}: its data {missing}: give their place with --data")
        return resolve_data(spec, seed=self.data_seed, val_fraction=self.val_fraction, labels=self.card.labels)

    def load_backbone(self, *, weights: Path | None = None) -> Backbone:
        """Return the frozen backbone that this run was trained on, after comparing its digest.

        Args:
            weights: Where its weights file lies now; None takes the place noted in the run.

        Raises:
            SpecError: The weights cannot be had, or are not those of the run.
            BundleCorruptError: The run's card tells other dimensions of the same backbone, or the run's own weights
                file is damaged.
        """
        if weights is None and self.own_weights in self.digests:
            RunCard.read(self.path).verify(str(self.own_weights))
        if weights is None and self.weights is not None:
            weights = self.path / self.weights  # an absolute path stays what it is
        image_size = self.card.preprocessing.image_size
        averages = self.pooling != "model"
        backbone = load_backbone(self.card.backbone.name, weights=weights, image_size=image_size, averages=averages)
        if backbone.identity.sha256 != self.card.backbone.sha256:
            mine, other = differing(self.card.backbone.sha256, backbone.identity.sha256)
            raise SpecError(
                f"{self.path}: was trained on {self.card.backbone.name} with digest {mine}, "
                f"the weights here have {other}; give the original ones with --weights"
            )
        if backbone.identity != self.card.backbone:
            raise BundleCorruptError(
                f"{self.path / CARD_FILE}: the backbone's dimensions {self.card.backbone.to_fields()} are not those of "
                f"{backbone.identity.name}: {backbone.identity.to_fields()}"
            )
        return backbone

    def load_model(self, backbone: Backbone) -> PromptedViT:
        """Return the trained model on its backbone, in eval mode.

        Args:
            backbone: The backbone of the run, as ``load_backbone`` returns it; several runs may share it.

        Raises:
            BundleCorruptError: The tensors do not fit the structure.
        """
        method = self._restored_method(backbone)
        model = PromptedViT(backbone.vit, method, len(self.card.labels), pools_prompts=self.pools_prompts)
        try:
            model.load_trained_state(dict(self.state))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise BundleCorruptError(f"{self.path / TENSOR_FILE}: does not fit {CARD_FILE}: {reason}") from error
        return model.eval()

    def _restored_method(self, backbone: Backbone) -> PromptMethod:
        dimensions = PromptDimensions.of(backbone.trunk)
        try:
            return restore_method(self.card.method, dimensions, dict(self.structure))
        except (BundleCorruptError, SpecError) as error:
            raise type(error)(f"{self.path / CARD_FILE}: {error}") from error
