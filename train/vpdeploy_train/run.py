"""A run on disk: what training writes and evaluation and export read.

::

    run/  task.json  prompts.safetensors        the result (``Run.write``, ``Run.read``)
          args.toml  history.csv  curves.png  pruning.png  pruning.json
          state/                                what --resume needs
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from vpdeploy.document import Document, to_json
from vpdeploy.errors import BundleCorruptError, BundleError, SpecError
from vpdeploy.files import write_atomically
from vpdeploy.task import RUN_FORMAT, BackboneId, TaskCard
from vpdeploy_train.backbone import Backbone, load_backbone
from vpdeploy_train.methods import PromptDimensions, PromptMethod, method_named
from vpdeploy_train.prompted import PromptedViT

CARD_FILE = "task.json"
TENSOR_FILE = "prompts.safetensors"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trained prompt set.

    Attributes:
        path: The run folder.
        card: What is known of the task.
        structure: ``PromptMethod.structure``: what was kept, and the method's options.
        state: The trained tensors, as ``PromptedViT.trained_state`` names them.
        data: The data specification it was trained on.
        data_seed: Seed of the splits that were drawn from it.
        val_fraction: Share of the training images that was held out.
        weights: The backbone's weights file, or None for timm's own.
    """

    path: Path
    card: TaskCard
    structure: Mapping[str, Any]
    state: Mapping[str, Tensor]
    data: str
    data_seed: int
    val_fraction: float
    weights: str | None

    def write(self) -> None:
        """Write ``prompts.safetensors`` and then ``task.json``, each atomically.

        Raises:
            OSError: The folder cannot be written.
        """
        fields = {
            "format": RUN_FORMAT,
            "format_version": FORMAT_VERSION,
            "task": self.card.to_fields(),
            "structure": dict(self.structure),
            "data": {"spec": self.data, "seed": self.data_seed, "val_fraction": self.val_fraction},
            "weights": self.weights,
        }
        tensors = {name: value.contiguous() for name, value in self.state.items()}
        write_atomically(self.path / TENSOR_FILE, safetensors.torch.save(tensors))
        write_atomically(self.path / CARD_FILE, to_json(fields).encode())

    @classmethod
    def read(cls, path: Path) -> Run:
        """Read a run folder.

        Raises:
            BundleError: The folder is no finished run.
            BundleCorruptError: A file is damaged.
            BundleVersionError: It was written in another format version.
        """
        if not (path / CARD_FILE).is_file():
            unfinished = (path / "state").is_dir()
            advice = "finish it with vpdeploy train --resume" if unfinished else "write one with vpdeploy train"
            raise BundleError(f"{path}: not a finished run, {CARD_FILE} is missing; {advice}")
        document = Document.read(path / CARD_FILE)
        document.expect_format(RUN_FORMAT, FORMAT_VERSION)
        data = document.nested("data")
        try:
            state = safetensors.torch.load_file(path / TENSOR_FILE)
        except (OSError, SafetensorError) as error:
            raise BundleCorruptError(f"{path / TENSOR_FILE}: cannot be read: {error}; train again") from error
        weights = document.fields.get("weights")
        return cls(
            path=path,
            card=TaskCard.from_document(document.nested("task")),
            structure=document.take("structure", dict),
            state=state,
            data=data.take("spec", str),
            data_seed=data.take("seed", int),
            val_fraction=data.take("val_fraction", float),
            weights=weights if weights is None else str(weights),
        )

    def load_backbone(self, *, weights: Path | None = None) -> Backbone:
        """Load the frozen backbone this run was trained on and compare its digest.

        Args:
            weights: Where its weights file lies now; None takes the place noted in the run.

        Raises:
            SpecError: The weights cannot be had, or are not those of the run.
        """
        if weights is None and self.weights is not None:
            weights = Path(self.weights)
        image_size = self.card.preprocessing.image_size
        backbone = load_backbone(self.card.backbone.name, weights=weights, image_size=image_size)
        if backbone.identity.sha256 != self.card.backbone.sha256:
            raise SpecError(
                f"{self.path}: was trained on {self.card.backbone.name} with digest {self.card.backbone.sha256[:12]}, "
                f"the weights here have {backbone.identity.sha256[:12]}; give the original ones with --weights"
            )
        return backbone

    def load_model(self, backbone: Backbone) -> PromptedViT:
        """Return the trained model on its backbone, in eval mode.

        Raises:
            BundleCorruptError: The tensors do not fit the structure.
        """
        model = PromptedViT(backbone.vit, self._restored_method(), len(self.card.labels))
        try:
            model.load_trained_state(dict(self.state))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise BundleCorruptError(f"{self.path / TENSOR_FILE}: does not fit {CARD_FILE}: {reason}") from error
        return model.eval()

    def _restored_method(self) -> PromptMethod:
        dimensions = prompt_dimensions(self.card.backbone)
        try:
            return method_named(self.card.method).restore(dimensions, dict(self.structure))
        except BundleCorruptError as error:
            raise BundleCorruptError(f"{self.path / CARD_FILE}: {error}") from error


def prompt_dimensions(identity: BackboneId) -> PromptDimensions:
    """Return the sizes that prompts take from a backbone."""
    return PromptDimensions(
        depth=identity.depth,
        width=identity.width,
        heads=identity.heads,
        head_width=identity.head_width,
        patch_size=identity.patch_size,
    )
