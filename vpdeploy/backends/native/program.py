"""Runs of a batch size, queued call by call at first, then captured and replayed; and which batch sizes there are."""

from __future__ import annotations

from vpdeploy.backends.native.device import Device
from vpdeploy.backends.native.engine import ExecutionContext
from vpdeploy.backends.native.memory import Staging
from vpdeploy.engines.profile import AxisRange
from vpdeploy.errors import BackendError


class Program:
    """Copy in, run and copy out a batch of ``rows`` images.

    The first run is queued call by call: it lets TensorRT bring its state up to date for the shapes, which must not be
    part of a graph. The second one is captured. A graph reads fixed addresses, so it stays right when a slot of the
    table is rewritten in place; when an address or a shape changes, ``forget`` has it captured again.

    Args:
        device: The GPU.
        context: The context to run; it is the program's own where graphs are captured, for TensorRT forbids to change a
            context that was captured.
        rows: The batch size.
        stream: The lane's stream, on which work is done in order.
        captures: Whether graphs are captured; not where the runtime captures its own.

    Attributes:
        refusal: Why runs cannot be captured, or None.
    """

    def __init__(self, device: Device, context: ExecutionContext, *, rows: int, stream: int, captures: bool) -> None:
        self.context = context
        self.rows = rows
        self.refusal: str | None = None
        self._device = device
        self._stream = stream
        self._captures = captures
        self._warm = False
        self._graph: int | None = None

    @property
    def is_captured(self) -> bool:
        """Tell whether runs are replays."""
        return self._graph is not None

    def start(self, staging: Staging) -> None:
        """Queue one run; the context is bound to ``rows`` images and the staging's addresses.

        Raises:
            BackendError: The GPU or the runtime failed.
        """
        if self._graph is None and self._captures and self._warm:
            self._capture(staging)
        if self._graph is not None:
            self._device.launch(self._graph, self._stream)
            return
        self._queue(staging)
        self._warm = True

    def forget(self) -> None:
        """Drop the graph: an address or a shape that it holds has changed."""
        if self._graph is not None:
            graph, self._graph = self._graph, None
            self._device.destroy_graph(graph)
        self._warm = False

    def _queue(self, staging: Staging) -> None:
        staging.send(self.rows, self._stream)
        self.context.enqueue(self._stream)
        staging.fetch(self.rows, self._stream)

    def _capture(self, staging: Staging) -> None:
        """Capture a run, or note why it cannot be; runs are then queued call by call for good."""
        if not self.context.is_capturable(self._stream):
            self._refuse("the engine cannot be captured")
            return

        # A failure inside must not leave the stream capturing, so the capture is ended whatever happens.
        self._device.begin_capture(self._stream)
        failure: BackendError | None = None
        try:
            self._queue(staging)
        except BackendError as error:
            failure = error

        # The runtime's reason comes first: CUDA then only says that the capture is invalid.
        try:
            graph = self._device.end_capture(self._stream)
        except BackendError as error:
            self._refuse(str(failure or error))
            return
        if failure is not None:
            self._device.destroy_graph(graph)
            self._refuse(str(failure))
            return
        self._graph = graph

    def _refuse(self, reason: str) -> None:
        self.refusal = reason
        self._captures = False


def bucket_sizes(batch: AxisRange) -> tuple[int, ...]:
    """Return the batch sizes to run, ascending: powers of two and the sizes halfway between them, within a profile.

    1, 2, 3, 4, 6, 8, 12, 16, 24, 32, ... Exact sizes would need a graph, a context and a tuned shape for each of them;
    powers of two alone would compute up to twice what was asked. So at most a third of a batch is padding.
    """
    sizes = {batch.smallest, batch.largest}
    power = 1
    while power < batch.largest:
        sizes |= {power, power + power // 2}
        power *= 2
    return tuple(sorted(size for size in sizes if batch.holds(size)))


def bucket_for(count: int, sizes: tuple[int, ...]) -> int:
    """Return the smallest of the sizes that holds ``count`` images, or the largest if none does."""
    return next((size for size in sizes if size >= count), sizes[-1])
