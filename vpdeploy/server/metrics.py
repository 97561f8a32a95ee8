"""What Prometheus can read of a server."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from vpdeploy.server.statistics import TaskStatistics
from vpdeploy.server.triton_metrics import triton_text
from vpdeploy.serving.batch import BatchReport

UNKNOWN_TASK = "(unknown)"
"""The label of requests for tasks that are not loaded: names that clients make up must not become time series."""

SEVERAL_TASKS = "(several)"
"""The label of fan-out requests."""

REMOVED_TASK = "(removed)"
"""The label under which what tasks counted that are gone is added up. None of these can be a task's name."""

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

_MANY = 256
"""Labels up to this number are not looked through for those of tasks that are gone, until somebody reads them."""


class Distribution:
    """How often values fell between bounds. Not thread-safe.

    Plain integers: counting a request in prometheus-client's own objects takes five times as long, and a server counts
    far more often than it is read.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def join(self, other: Distribution) -> None:
        """Add what another one of the same bounds has counted."""
        self._counts = [own + more for own, more in zip(self._counts, other._counts, strict=True)]
        self._sum += other._sum

    def write_to(self, family: HistogramMetricFamily, labels: Sequence[str] = ()) -> None:
        """Add the distribution to a family of histograms."""
        edges = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        family.add_metric(labels, list(zip(edges, accumulate(self._counts), strict=True)), self._sum)


class Metrics:
    """Counters of one server, in a registry of its own. Every method may be called from any thread.

    Args:
        loaded: Returns the names of the loaded tasks; series of others end, and what they counted goes to those of
            ``(removed)``, so that no sum over tasks falls.
        read_statistics: Returns the account of each loaded task.
    """

    def __init__(
        self, loaded: Callable[[], Collection[str]], read_statistics: Callable[[], Iterable[TaskStatistics]]
    ) -> None:
        self._loaded = loaded
        self._read_statistics = read_statistics
        self._lock = threading.Lock()
        self._requests: dict[str, dict[int, int]] = {}
        self._latency: dict[str, Distribution] = {}
        self._images: dict[str, int] = {}
        self._batch_size = Distribution(_COUNTS)
        self._batch_tasks = Distribution(_COUNTS)
        self._queue_time = Distribution(_SECONDS)
        self._run_time = Distribution(_SECONDS)
        self._decode_time = Distribution(_SECONDS)
        self._failed_batches = 0
        self._failed_syncs = 0
        self._totals: dict[str, tuple[str, Callable[[], float]]] = {}
        self._values: dict[str, tuple[str, Callable[[], float]]] = {}
        self.registry = CollectorRegistry()
        self.registry.register(_Families(self))
        self.watch_total(
            "vpdeploy_failed_batches", "Batches that the runtime failed to run.", lambda: self._failed_batches
        )
        self.watch_total(
            "vpdeploy_failed_syncs", "Looks at the bundle on disk that failed.", lambda: self._failed_syncs
        )

    def count_request(self, *, task: str, status: int, seconds: float) -> None:
        """Count one answered inference request; ``task`` must be a loaded task or one of the labels above."""
        with self._lock:
            statuses = self._requests.get(task)
            if statuses is None:
                self._bound()
                statuses = self._requests[task] = {}
                self._latency[task] = Distribution(_SECONDS)
            statuses[status] = statuses.get(status, 0) + 1
            self._latency[task].add(seconds)

    def count_decoding(self, seconds: float) -> None:
        """Count one decoded image."""
        with self._lock:
            self._decode_time.add(seconds)

    def count_batch(self, report: BatchReport) -> None:
        """Count one batch that ran."""
        with self._lock:
            for task, images in report.images.items():
                self._images[task] = self._images.get(task, 0) + images
            self._failed_batches += report.has_failed
            self._batch_size.add(len(report.queue_s))
            self._batch_tasks.add(len(report.images))
            self._run_time.add(report.run_s)
            for seconds in report.queue_s:
                self._queue_time.add(seconds)

    def count_failed_sync(self) -> None:
        """Count one time that the bundle could not be followed, or a task of it."""
        with self._lock:
            self._failed_syncs += 1

    def watch_value(self, name: str, description: str, read: Callable[[], float]) -> None:
        """Show a value that is read whenever Prometheus asks."""
        self._values[name] = (description, read)

    def watch_total(self, name: str, description: str, read: Callable[[], float]) -> None:
        """Show a total, which never falls, that is read whenever Prometheus asks; ``_total`` is added to the name."""
        self._totals[name] = (description, read)

    def render(self) -> tuple[bytes, str]:
        """Return the text that Prometheus reads, and its content type."""
        return generate_latest(self.registry) + triton_text(self._read_statistics()), CONTENT_TYPE_LATEST

    def families(self) -> Iterator[Metric]:
        """Return everything but what stands under Triton's names."""
        with self._lock:
            self._end_others()
            yield from self._counted()
        for name, (description, read) in self._totals.items():
            yield CounterMetricFamily(name, description, value=read())
        for name, (description, read) in self._values.items():
            yield GaugeMetricFamily(name, description, value=read())

    def _counted(self) -> list[Metric]:
        requests = CounterMetricFamily(
            "vpdeploy_requests", "Inference requests by task and HTTP status.", labels=["task", "status"]
        )
        for task, statuses in self._requests.items():
            for status, count in statuses.items():
                requests.add_metric([task, str(status)], count)
        latency = HistogramMetricFamily(
            "vpdeploy_request_seconds", "From the head of an inference request to its response.", labels=["task"]
        )
        for task, distribution in self._latency.items():
            distribution.write_to(latency, [task])
        images = CounterMetricFamily("vpdeploy_images", "Images run, by task.", labels=["task"])
        for task, count in self._images.items():
            images.add_metric([task], count)
        plain = {
            ("vpdeploy_batch_size", "Images in a batch."): self._batch_size,
            ("vpdeploy_batch_tasks", "Different tasks in a batch."): self._batch_tasks,
            ("vpdeploy_queue_seconds", "How long an image waited for its batch."): self._queue_time,
            ("vpdeploy_run_seconds", "How long a batch ran."): self._run_time,
            ("vpdeploy_decode_seconds", "How long an image was decoded."): self._decode_time,
        }
        families: list[Metric] = [requests, latency, images]
        for (name, description), distribution in plain.items():
            family = HistogramMetricFamily(name, description)
            distribution.write_to(family)
            families.append(family)
        return families

    def _bound(self) -> None:
        """End the series of tasks that are gone, where there are many: perhaps nobody ever reads them."""
        if len(self._requests) >= _MANY and len(self._requests) >= 2 * len(self._loaded()):
            self._end_others()

    def _end_others(self) -> None:
        kept = {*self._loaded(), UNKNOWN_TASK, SEVERAL_TASKS, REMOVED_TASK}
        for task in [task for task in self._requests if task not in kept]:
            removed = self._requests.setdefault(REMOVED_TASK, {})
            for status, count in self._requests.pop(task).items():
                removed[status] = removed.get(status, 0) + count
            self._latency.setdefault(REMOVED_TASK, Distribution(_SECONDS)).join(self._latency.pop(task))
        for task in [task for task in self._images if task not in kept]:
            self._images[REMOVED_TASK] = self._images.get(REMOVED_TASK, 0) + self._images.pop(task)


class _Families(Collector):
    """What the registry asks."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Return what was counted."""
        return self._metrics.families()
