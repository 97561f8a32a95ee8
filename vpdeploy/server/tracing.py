"""Spans of requests for OpenTelemetry: the request, its decoding, its wait and its run.

Nothing here is loaded unless tracing was asked for.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import vpdeploy
from vpdeploy.errors import MissingExtraError
from vpdeploy.server.statistics import RequestTimes
from vpdeploy.serving.queue import BatchRun

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span, SpanContext

_ASKING = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_TRACES_EXPORTER")

_FLUSH_MS = 3000
"""How long the last spans may take to be sent when the server ends."""


def is_asked_for(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether OpenTelemetry's own variables ask for traces."""
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true" or environment.get("OTEL_TRACES_EXPORTER") == "none":
        return False
    return any(environment.get(name) for name in _ASKING)


class Tracing:
    """Makes spans. Every method may be called from any thread.

    Where spans go, what is sampled and what the service is called, OpenTelemetry's variables say.

    Args:
        processor: Takes the spans that have ended; None sends them in the background by OTLP over HTTP.

    Raises:
        MissingExtraError: OpenTelemetry is not installed.
    """

    def __init__(self, processor: SpanProcessor | None = None) -> None:
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            if processor is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
                from opentelemetry.sdk.trace.export import BatchSpanProcessor

                processor = BatchSpanProcessor(OTLPSpanExporter())
        except ModuleNotFoundError as error:
            raise MissingExtraError(error.name or "opentelemetry", "otel") from error
        named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "vpdeploy"}
        self._provider = TracerProvider(
            resource=Resource.create({**named, "service.version": vpdeploy.__version__}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("vpdeploy", vpdeploy.__version__)
        self._propagator = TraceContextTextMapPropagator()
        self._lock = threading.Lock()
        self._batches: WeakKeyDictionary[BatchRun, SpanContext] = WeakKeyDictionary()

    def begin(self, traceparent: str | None, tracestate: str | None) -> RequestSpan:
        """Begin the span of a request.

        Args:
            traceparent: A valid header of the client's, whose span is then the parent.
            tracestate: The header that goes with it.
        """
        from opentelemetry.trace import SpanKind

        headers = {} if traceparent is None else {"traceparent": traceparent, "tracestate": tracestate or ""}
        parent = self._propagator.extract(headers)
        return RequestSpan(self, self._tracer.start_span("request", context=parent, kind=SpanKind.SERVER))

    def close(self) -> None:
        """Send what has not been sent, within a few seconds."""
        self._provider.force_flush(_FLUSH_MS)
        self._provider.shutdown()

    def add_child(self, parent: Span, name: str, span: tuple[float, float], era: _Era, **more: Any) -> None:
        """Add a span that has ended; its times are readings of ``time.monotonic``, in s."""
        from opentelemetry.trace import set_span_in_context

        child = self._tracer.start_span(name, context=set_span_in_context(parent), start_time=era.ns(span[0]), **more)
        child.end(era.ns(span[1]))

    def batch_of(self, run: BatchRun, era: _Era) -> SpanContext:
        """Return the span of a batch, which has a trace of its own: requests of many traces share it."""
        from opentelemetry.context import Context

        with self._lock:
            known = self._batches.get(run)
            if known is None:
                span = self._tracer.start_span(
                    "batch",
                    context=Context(),
                    start_time=era.ns(run.started_at),
                    attributes={"vpdeploy.batch.size": run.size},
                )
                span.end(era.ns(run.ended_at))
                known = self._batches[run] = span.get_span_context()
        return known


class RequestSpan:
    """The span of one request, until it is answered."""

    def __init__(self, tracing: Tracing, span: Span) -> None:
        self._tracing = tracing
        self._span = span

    @property
    def traceparent(self) -> str:
        """The span as a ``traceparent`` header."""
        context = self._span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"

    def end(
        self, *, method: str, route: str | None, status: int, times: RequestTimes | None, tasks: Sequence[str]
    ) -> None:
        """End the span, with one child for each part of the way that the request went.

        Args:
            method: HTTP's.
            route: The route's template; None where no route fits.
            status: HTTP's.
            times: The request's moments; None where it never came to the service.
            tasks: Names of the tasks that were asked.
        """
        from opentelemetry.trace import Link, Status, StatusCode

        span, tracing, era = self._span, self._tracing, _Era()
        if span.is_recording():
            span.update_name(f"{method} {route}" if route is not None else method)
            span.set_attribute("http.request.method", method)
            span.set_attribute("http.response.status_code", status)
            if route is not None:
                span.set_attribute("http.route", route)
            if times is not None:
                span.set_attribute("vpdeploy.tasks", list(tasks))
            if status >= 500:
                span.set_status(Status(StatusCode.ERROR))
            if times is not None:
                if times.decode_span is not None:
                    tracing.add_child(span, "decode", times.decode_span, era)
                queued_at = min((answer.queued_at for answer in times.answers), default=None)
                if queued_at is not None and times.run_span is not None:
                    tracing.add_child(span, "queue", (queued_at, times.run_span[0]), era)
                    runs = dict.fromkeys(answer.run for answer in times.answers if answer.run is not None)
                    links = [Link(tracing.batch_of(run, era)) for run in runs]
                    tracing.add_child(span, "run", times.run_span, era, links=links)
        span.end()


class _Era:
    """How two clocks stood to each other: one reading for all spans of a request, so that they keep their order."""

    def __init__(self) -> None:
        self._began_ns = time.time_ns() - time.monotonic_ns()

    def ns(self, moment: float) -> int:
        """Return a reading of ``time.monotonic``, in s, as ns since 1970."""
        return self._began_ns + int(moment * 1e9)
