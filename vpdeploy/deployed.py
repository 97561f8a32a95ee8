"""An exported graph on disk, and what a runtime has to know of it to run it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from vpdeploy.bundle import Bundle, is_bundle
from vpdeploy.datafile import DataFile
from vpdeploy.errors import BundleError
from vpdeploy.files import sha256_of_file
from vpdeploy.folded import FoldedCard
from vpdeploy.layout import Layout
from vpdeploy.manifest import Precision
from vpdeploy.onnxfile import read_metadata
from vpdeploy.preprocessing import Preprocessing

ENGINES_FOLDER = "engines"


@dataclass(frozen=True, kw_only=True)
class DeployedGraph:
    """A bundle's graph, or a folded model.

    Attributes:
        artifact: What the user names: the bundle's folder or the folded file.
        path: The ONNX file.
        precision: Of weights and matrix products.
        preprocessing: One for all tasks.
        layout: Of the bundle's table; None for a folded model.
        bundle: The bundle, or None.
        folded: What a folded file says of itself, or None.
    """

    artifact: Path
    path: Path
    precision: Precision
    preprocessing: Preprocessing
    layout: Layout | None
    bundle: Bundle | None = None
    folded: FoldedCard | None = None

    @classmethod
    def open(cls, path: Path) -> DeployedGraph:
        """Read what a bundle folder or a folded ONNX file says of its graph.

        A bundle's graph is compared with its manifest, a data file with what the graph says of it.

        Raises:
            BundleError: The path is neither, or a file of it is damaged, foreign or of another version.
        """
        if path.is_file():
            if path.suffix != ".onnx":
                raise BundleError(f"{path}: not an .onnx file; expected one written by vpdeploy export")
            metadata = read_metadata(path)
            card = FoldedCard.from_metadata(metadata, source=str(path))
            if (data := DataFile.from_metadata(metadata, source=str(path))) is not None:
                data.verify(path.parent)
            return cls.of_folded(path, card)
        if not is_bundle(path):
            state = "does not exist" if not path.exists() else "is neither"
            raise BundleError(f"{path}: {state}; expected a bundle folder or an .onnx file of vpdeploy export")
        return cls.of_bundle(Bundle.open(path))

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> DeployedGraph:
        """Return a bundle's graph after comparing its bytes with the manifest.

        Raises:
            BundleCorruptError: The graph is missing or was changed.
        """
        manifest = bundle.manifest
        return cls(
            artifact=bundle.path,
            path=bundle.verified_graph(),
            precision=manifest.precision,
            preprocessing=manifest.preprocessing,
            layout=manifest.layout,
            bundle=bundle,
        )

    @classmethod
    def of_folded(cls, path: Path, card: FoldedCard) -> DeployedGraph:
        """Return a folded file's graph."""
        return cls(
            artifact=path,
            path=path,
            precision=card.precision,
            preprocessing=card.task.preprocessing,
            layout=None,
            folded=card,
        )

    @cached_property
    def sha256(self) -> str:
        """Of the ONNX file, which gives its data file's own: it stands for both. What engines are bound to."""
        return self.bundle.manifest.graph_sha256 if self.bundle is not None else sha256_of_file(self.path)

    @property
    def engines_folder(self) -> Path:
        """Where engines built from the graph lie."""
        return self.path.parent / ENGINES_FOLDER
