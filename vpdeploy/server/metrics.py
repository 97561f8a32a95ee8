"""What Prometheus can read of a server."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from vpdeploy.serving.batch import BatchReport

UNKNOWN_TASK = "(unknown)"
"""The label of requests for tasks that are not loaded: names that clients make up must not become time series."""

SEVERAL_TASKS = "(several)"
"""The label of fan-out requests. Neither label can be a task's name."""

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "vpdeploy_requests",
            "Inference requests by task and HTTP status.",
            ["task", "status"],
            registry=self.registry,
        )
        self._latency = Histogram(
            "vpdeploy_request_seconds",
            "From the head of an inference request to its response.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._images = Counter("vpdeploy_images", "Images run, by task.", ["task"], registry=self.registry)
        self._batch_size = Histogram(
            "vpdeploy_batch_size", "Images in a batch.", buckets=_COUNTS, registry=self.registry
        )
        self._batch_tasks = Histogram(
            "vpdeploy_batch_tasks", "Different tasks in a batch.", buckets=_COUNTS, registry=self.registry
        )
        self._queue_time = Histogram(
            "vpdeploy_queue_seconds",
            "How long an image waited for its batch.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._run_time = Histogram(
            "vpdeploy_run_seconds", "How long a batch ran.", buckets=_SECONDS, registry=self.registry
        )

    def count_request(self, *, task: str, status: int, seconds: float) -> None:
        """Count one answered inference request; ``task`` must be a loaded task or one of the labels above."""
        self._requests.labels(task, str(status)).inc()
        self._latency.observe(seconds)

    def count_batch(self, report: BatchReport) -> None:
        """Count one batch that ran."""
        for task, images in report.images.items():
            self._images.labels(task).inc(images)
        self._batch_size.observe(len(report.queue_s))
        self._batch_tasks.observe(len(report.images))
        self._run_time.observe(report.run_s)
        for seconds in report.queue_s:
            self._queue_time.observe(seconds)

    def watch_value(self, name: str, description: str, read: Callable[[], float]) -> None:
        """Show a value that is read whenever Prometheus asks."""
        Gauge(name, description, registry=self.registry).set_function(read)

    def render(self) -> tuple[bytes, str]:
        """Return the text that Prometheus reads, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
