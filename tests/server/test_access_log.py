"""The access log, request ids and traces: requests can be followed, and nothing that clients send forges a line."""

from __future__ import annotations

import http.client
import io
import json
import logging
import re

import httpx
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from server.running import TIMEOUT_S, serving, until
from server.toy_bundle import encoded

from vpdeploy import load
from vpdeploy.server.logs import JsonFormatter, TextFormatter
from vpdeploy.server.request_context import request_id_of, traceparent_of
from vpdeploy.server.settings import ServerSettings
from vpdeploy.server.tracing import Tracing, is_asked_for
from vpdeploy.text import printable

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def logging_server(toy_bundle):
    exporter = InMemorySpanExporter()
    tracing = Tracing(SimpleSpanProcessor(exporter))
    with load(toy_bundle) as session, serving(session, ServerSettings(access_log=True), tracing=tracing) as server:
        server.spans = exporter
        yield server
    tracing.close()


class Lines:
    """The lines that handlers of both formats write of what is logged meanwhile."""

    def __init__(self):
        self._streams = {}
        self._logger = logging.getLogger("vpdeploy.access")

    def __enter__(self):
        self._level = self._logger.level
        self._logger.setLevel(logging.INFO)
        for name, formatter in (("json", JsonFormatter()), ("text", TextFormatter())):
            handler = logging.StreamHandler(io.StringIO())
            handler.setFormatter(formatter)
            self._streams[name] = handler
            self._logger.addHandler(handler)
        return self

    def __exit__(self, *_):
        self._logger.setLevel(self._level)
        for handler in self._streams.values():
            self._logger.removeHandler(handler)

    def json(self):
        return [json.loads(line) for line in self._streams["json"].stream.getvalue().splitlines()]

    def text(self):
        return self._streams["text"].stream.getvalue().split("\n")[:-1]


@pytest.mark.parametrize(
    "given", ["a", "0123456789abcdef", "f81d4fae-7dec-11d0-a765-00a0c91e6bf6", "Root=1-67891233/x"]
)
def test_a_usual_request_id_is_kept(given):
    assert request_id_of(given) == given


@pytest.mark.parametrize("given", [None, "", "-", "two words", "a\nb", "a\x1b[31m", "é", "a" * 129, 'quote"'])
def test_any_other_request_id_is_replaced_by_a_new_one(given):
    assert re.fullmatch("[0-9a-f]{32}", request_id_of(given))
    assert request_id_of(given) != request_id_of(given)


@pytest.mark.parametrize("given", [TRACEPARENT, TRACEPARENT.replace("00-", "01-", 1) + "-more"])
def test_a_valid_traceparent_is_passed_through(given):
    assert traceparent_of(given) == given


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        TRACEPARENT.upper(),
        "ff" + TRACEPARENT[2:],
        TRACEPARENT + "-more",
        f"00-{'0' * 32}-b7ad6b7169203331-01",
        f"00-0af7651916cd43dd8448eb211c80319c-{'0' * 16}-01",
        TRACEPARENT + "\n",
        TRACEPARENT[:-1],
    ],
)
def test_any_other_traceparent_is_dropped(given):
    assert traceparent_of(given) is None


def test_a_request_is_one_line_with_its_task_its_times_and_the_id_that_the_client_gets(logging_server):
    with Lines() as lines, httpx.Client(base_url=logging_server.url, timeout=TIMEOUT_S) as client:
        # The address is the connection's own, whatever a header says: shares of the memory go by it.
        headers = {"X-Request-Id": "mine-1", "X-Forwarded-For": "203.0.113.9"}
        answer = client.post("/v1/tasks/rgb:predict?secret=1", content=encoded("red"), headers=headers)
        made = client.get("/v2/models/none").headers["x-request-id"]
        until(lambda: {"mine-1", made} <= {line["id"] for line in lines.json()})  # written when the answer has gone
    assert answer.headers["x-request-id"] == "mine-1"
    first, second = lines.json()
    assert {name: first[name] for name in ("id", "client", "method", "path", "task", "status", "bytes")} == {
        "id": "mine-1",
        "client": "127.0.0.1",
        "method": "POST",
        "path": "/v1/tasks/rgb:predict",
        "task": "rgb",
        "status": 200,
        "bytes": len(answer.content),
    }
    assert 0 <= first["queue_ms"] <= first["ms"]
    assert (second["id"], second["status"], second["task"], second["queue_ms"]) == (made, 404, "none", None)
    assert "secret" not in "".join(lines.text())


def test_nothing_that_a_client_sends_makes_a_second_line_or_another_field(logging_server):
    hostile = [
        "/v1/tasks/a%0a2026-01-01%20INFO%20forged",
        "/v1/tasks/a%0d%0astatus=200%1b[2J%e2%80%ae%c2%85",
        "/v1/tasks/a%20status=200%20id=x",
        "/" + "x" * 5000,
        '/v1/tasks/a"},{"x":"',
    ]
    with Lines() as lines:
        for path in hostile:
            connection = http.client.HTTPConnection(logging_server.address, timeout=TIMEOUT_S)
            connection.putrequest("GET", path)
            connection.putheader("X-Request-Id", "evil id=2 status=1")
            connection.putheader("traceparent", "00-evil")
            connection.endheaders()
            connection.getresponse().read()
            connection.close()
        until(lambda: len(lines.json()) >= len(hostile))
    text, fields = lines.text(), lines.json()
    assert len(text) == len(fields) == len(hostile)
    for line, each in zip(text, fields, strict=True):
        assert line.isprintable()
        assert len(line) < 1000
        assert line.count(" status=") == 1
        assert line.count(" id=") == 1
        assert each["status"] in (401, 404)
        assert each["traceparent"] is None
        assert all(str(value).isprintable() for value in each.values())


def test_control_characters_in_any_message_are_escaped():
    record = logging.LogRecord("vpdeploy.x", logging.ERROR, "f", 1, "task '%s' is bad", ("a\nb\x1b[0m\u2028",), None)
    assert TextFormatter().format(record).endswith(r"task 'a\nb\x1b[0m\u2028' is bad")


def test_what_others_wrote_stands_on_one_line():
    assert printable("a b\\n\n\x00é\u202e", 40) == r"a%20b\\n\n\x00é\u202e"
    assert printable("x" * 50, 10) == "x" * 10 + "…"


def spans_of(exporter, trace: str) -> dict:
    """The spans of one trace by name: those of other tests' requests may end meanwhile."""
    return {span.name: span for span in exporter.get_finished_spans() if f"{span.context.trace_id:032x}" == trace}


def test_a_request_has_spans_for_each_part_and_its_run_is_linked_with_the_batch(logging_server):
    exporter, trace = logging_server.spans, "1" * 32
    traceparent = f"00-{trace}-b7ad6b7169203331-01"
    with httpx.Client(base_url=logging_server.url, timeout=TIMEOUT_S) as client:
        files = [("image", ("a.png", encoded("red")))]
        answer = client.post("/v1/predict?tasks=rgb,bgr", files=files, headers={"traceparent": traceparent})
    until(lambda: "POST /v1/predict" in spans_of(exporter, trace))  # a span ends when its answer has gone
    spans = spans_of(exporter, trace)
    assert set(spans) == {"POST /v1/predict", "decode", "queue", "run"}
    request, run = spans["POST /v1/predict"], spans["run"]
    assert f"{request.parent.span_id:016x}" == traceparent.split("-")[2]
    assert answer.headers["traceparent"].split("-")[2] == f"{request.context.span_id:016x}"
    assert request.attributes["vpdeploy.tasks"] == ("rgb", "bgr")
    for name in ("decode", "queue", "run"):
        assert spans[name].parent.span_id == request.context.span_id
        assert request.start_time <= spans[name].start_time <= spans[name].end_time <= request.end_time
    assert spans["decode"].end_time <= spans["queue"].start_time <= spans["queue"].end_time <= run.start_time

    (link,) = run.links
    (batch,) = [span for span in exporter.get_finished_spans() if span.context.span_id == link.context.span_id]
    assert (batch.name, batch.parent) == ("batch", None)
    assert batch.attributes["vpdeploy.batch.size"] == 2


def test_a_request_that_never_came_to_a_batch_has_no_further_spans(logging_server):
    trace = "2" * 32
    with httpx.Client(base_url=logging_server.url, timeout=TIMEOUT_S) as client:
        headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
        assert client.post("/v1/tasks/rgb:predict", content=b"no image", headers=headers).status_code == 400
    until(lambda: spans_of(logging_server.spans, trace))
    assert set(spans_of(logging_server.spans, trace)) == {"POST /v1/tasks/{task:task}:predict"}


@pytest.mark.parametrize(
    ("environment", "asked"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_opentelemetrys_own_variables_ask_for_traces(environment, asked):
    assert is_asked_for(environment) is asked
