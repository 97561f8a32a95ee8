"""Loading what ``vpdeploy export`` wrote."""

from __future__ import annotations

from pathlib import Path

from vpdeploy.backends import AUTO, open_backend
from vpdeploy.bundle import Bundle, is_bundle
from vpdeploy.errors import BundleError
from vpdeploy.folded import FoldedCard
from vpdeploy.session import Session


def open_session(path: Path | str, *, runtime: str = AUTO, threads: int | None = None) -> Session:
    """Load a bundle or a folded ONNX file.

    Args:
        path: A bundle folder, or a file that ``vpdeploy export`` wrote.
        runtime: ``auto``, or a runtime's name (see ``vpdeploy.backends.RUNTIMES``).
        threads: CPU threads inside one run; None leaves it to the runtime.

    Returns:
        A session, owned by the caller.

    Raises:
        BundleError: The path is neither, or a file of it is damaged, foreign or of another version.
        LayoutMismatchError: A prompt set does not fit the bundle's graph.
        BackendError: The runtime asked for does not work here, or cannot load the graph.
        SpecError: There is no runtime of that name.
    """
    path = Path(path)
    if path.is_file():
        return _open_folded(path, runtime, threads)
    if not is_bundle(path):
        state = "does not exist" if not path.exists() else "is neither"
        raise BundleError(f"{path}: {state}; expected a bundle folder or an .onnx file of vpdeploy export")
    bundle = Bundle.open(path)
    tasks = [(bundle.read_task(name), bundle.manifest.entry(name).version) for name in bundle.tasks]
    return Session(
        open_backend(bundle.verified_graph(), runtime=runtime, threads=threads),
        preprocessing=bundle.manifest.preprocessing,
        precision=bundle.manifest.precision,
        bundle=bundle,
        tasks=tasks,
    )


def _open_folded(path: Path, runtime: str, threads: int | None) -> Session:
    try:
        backend = open_backend(path, runtime=runtime, threads=threads)
    except Exception as error:
        if path.suffix != ".onnx":
            raise BundleError(f"{path}: not an .onnx file; expected one written by vpdeploy export") from error
        raise
    card = FoldedCard.from_metadata(backend.metadata, source=str(path))
    return Session(backend, preprocessing=card.task.preprocessing, precision=card.precision, folded=card.task)
