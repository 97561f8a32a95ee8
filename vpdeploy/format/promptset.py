"""A compiled prompt set: all that one task adds to the shared graph."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vpdeploy.errors import BundleCorruptError
from vpdeploy.format.document import Document, to_json
from vpdeploy.format.layout import CLASS_AXIS, Layout
from vpdeploy.format.task import TaskCard
from vpdeploy.format.tensorfile import Tensors, decode_tensors, encode_tensors

CARD_FILE = "task.json"
TENSOR_FILE = "prompts.safetensors"
FORMAT = "vpdeploy.prompt-set"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class CompiledPromptSet:
    """A task's card and its compiled tensors.

    Attributes:
        card: What is known of the task.
        layout: Names, shapes and dtypes of the tensors.
        tensors: Read-only arrays by name, shapes as in the layout, without the slot axis.
    """

    card: TaskCard
    layout: Layout
    tensors: Tensors

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(array.nbytes for array in self.tensors.values())

    def sizes(self) -> dict[str, int]:
        """Return the named sizes, e.g. ``{"prefix": 15, "classes": 10}``.

        Raises:
            LayoutMismatchError: The tensors are not of the layout.
        """
        return self.layout.sizes_of(self.tensors, source=f"task '{self.card.name}'")

    def encode(self) -> dict[str, bytes]:
        """Return the files of the prompt set: name and bytes."""
        fields = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "layout": self.layout.to_fields(),
            "task": self.card.to_fields(),
        }
        return {CARD_FILE: to_json(fields).encode(), TENSOR_FILE: encode_tensors(self.tensors)}

    @classmethod
    def decode(cls, files: dict[str, bytes], *, folder: Path) -> CompiledPromptSet:
        """Read a prompt set from its files' bytes; ``folder`` names them in errors.

        Raises:
            BundleCorruptError: A file is damaged.
            BundleVersionError: It was written in another format version.
            LayoutMismatchError: The tensors do not fit the layout the card names.
        """
        document = Document.parse(files[CARD_FILE].decode("utf-8", errors="replace"), source=str(folder / CARD_FILE))
        document.expect_format(FORMAT, FORMAT_VERSION)
        prompt_set = cls(
            card=TaskCard.from_document(document.nested("task")),
            layout=Layout.from_document(document.nested("layout")),
            tensors=decode_tensors(files[TENSOR_FILE], source=str(folder / TENSOR_FILE)),
        )
        labels, classes = len(prompt_set.card.labels), prompt_set.sizes().get(CLASS_AXIS)
        if labels != classes:
            raise BundleCorruptError(
                f"{document.source}: {labels} labels, but the head has {classes} classes; export again"
            )
        return prompt_set
