"""The account of requests under the names that Triton gives them, so that its dashboards and alerts work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from vpdeploy.server.statistics import DurationSum, TaskStatistics


def triton_text(statistics: Iterable[TaskStatistics]) -> bytes:
    """Return the accounts in Prometheus's text format.

    Written here: prometheus-client adds ``_total`` to the name of every counter, and Triton's have none.
    """
    accounts = list(statistics)
    lines: list[str] = []
    for name, (description, read) in _COUNTERS.items():
        lines += _head(name, "counter", description)
        lines += [f"{name}{{{_labels(each)}}} {read(each)}" for each in accounts]
    lines += _head("nv_inference_request_failure", "counter", "Number of failed inference requests")
    for each in accounts:
        for reason, failed in each.failures.items():
            labels = f'{_labels(each)},reason="{reason.value}"'
            lines.append(f"nv_inference_request_failure{{{labels}}} {failed.count}")
    lines += _head("nv_inference_pending_request_count", "gauge", "Number of requests that wait for a batch")
    lines += [f"nv_inference_pending_request_count{{{_labels(each)}}} {each.pending}" for each in accounts]
    return "".join(f"{line}\n" for line in lines).encode()


def _us(read: Callable[[TaskStatistics], DurationSum]) -> Callable[[TaskStatistics], int]:
    return lambda statistics: read(statistics).ns // 1000


_COUNTERS: dict[str, tuple[str, Callable[[TaskStatistics], int]]] = {
    "nv_inference_request_success": ("Number of successful inference requests", lambda each: each.success.count),
    "nv_inference_count": ("Number of inferences: a request of n images counts n", lambda each: each.inference_count),
    "nv_inference_exec_count": (
        "Number of batches that held an image of the model's",
        lambda each: each.execution_count,
    ),
    "nv_inference_request_duration_us": (
        "Cumulative duration of successful requests, in microseconds",
        _us(lambda each: each.success),
    ),
    "nv_inference_queue_duration_us": (
        "Cumulative time that requests waited, in microseconds",
        _us(lambda each: each.queue),
    ),
    "nv_inference_compute_input_duration_us": (
        "Cumulative time in which images of requests were decoded and stacked, in microseconds",
        _us(lambda each: each.compute_input),
    ),
    "nv_inference_compute_infer_duration_us": (
        "Cumulative time of the batches that requests were part of, in microseconds",
        _us(lambda each: each.compute_infer),
    ),
    "nv_inference_compute_output_duration_us": (
        "Cumulative time from the end of a batch to the answers of its requests, in microseconds",
        _us(lambda each: each.compute_output),
    ),
}


def _head(name: str, kind: str, description: str) -> Sequence[str]:
    return (f"# HELP {name} {description}", f"# TYPE {name} {kind}")


def _labels(statistics: TaskStatistics) -> str:
    name = statistics.task.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'model="{name}",version="{statistics.version}"'
