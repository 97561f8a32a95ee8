"""Loading what ``vpdeploy export`` wrote."""

from __future__ import annotations

from pathlib import Path

from vpdeploy.backends import AUTO
from vpdeploy.format.artifact import Artifact
from vpdeploy.session.session import Session


def load(path: Path | str, *, runtime: str = AUTO, threads: int | None = None) -> Session:
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

    Example:
        >>> with vpdeploy.load(zoo) as session:
        ...     session.tasks
        ('flowers', 'birds', 'probe')
    """
    return Session.of(Artifact.open(Path(path)), runtime=runtime, threads=threads)
