"""Spans over OTLP, to a collector that is a few lines of HTTP server here."""

from __future__ import annotations

import builtins
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from scripted_worker import refuse

from afd.errors import ConfigError
from router.telemetry import tracing

pytest.importorskip("opentelemetry.sdk")
trace_service_pb2 = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
gzip = pytest.importorskip("gzip")

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
BODY = {"model": "tiny", "prompt": "a secret prompt", "max_tokens": 64, "temperature": 0.5}


class Collector:
    """Keeps what is posted to /v1/traces."""

    def __init__(self) -> None:
        self.spans: queue.Queue = queue.Queue()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    raw = gzip.decompress(raw)
                request = trace_service_pb2.ExportTraceServiceRequest.FromString(raw)
                for resource in request.resource_spans:
                    for scope in resource.scope_spans:
                        for span in scope.spans:
                            collector.spans.put((self.path, span))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


def values(span):
    kinds = {attribute.key: attribute.value for attribute in span.attributes}
    return {key: getattr(value, value.WhichOneof("value")) for key, value in kinds.items()}


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_one_span_under_the_clients_with_usage_and_latencies(
    start, settings, worker, collector, stream, tokenizer
):
    router = start(replace(settings, otlp_endpoint=collector.url), worker)
    before = time.time_ns()
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "X-Request-Id": "mine"}
    response = router.http.post("/v1/completions", json={**BODY, "stream": stream}, headers=headers)
    assert response.status_code == 200
    router.http.get("/health")
    router.close()  # what is left is sent at the end
    path, span = collector.spans.get(timeout=10)
    assert path == "/v1/traces"
    assert (span.trace_id.hex(), span.parent_span_id.hex(), span.name) == (TRACE_ID, PARENT_ID, "text_completion tiny")
    assert before <= span.start_time_unix_nano < span.end_time_unix_nano <= time.time_ns()
    found = values(span)
    assert found["gen_ai.operation.name"] == "text_completion"
    assert found["gen_ai.response.model"] == "tiny"
    assert found["gen_ai.usage.input_tokens"] == len(tokenizer.encode(BODY["prompt"], special=True))
    assert found["gen_ai.usage.output_tokens"] == len(tokenizer.encode("Paris is the city of light", special=False))
    assert 0 < found["gen_ai.latency.time_to_first_token"] <= found["gen_ai.latency.e2e"]
    assert [value.string_value for value in found["gen_ai.response.finish_reasons"].values] == ["stop"]
    assert (found["http.response.status_code"], found["afd.request_id"]) == (200, "mine")
    assert found["gen_ai.request.temperature"] == 0.5
    assert "secret" not in str(span)
    assert collector.spans.empty(), "only generation has spans"


def test_a_refused_request_says_so_in_its_span(start, settings, worker, collector):
    worker.script = refuse
    router = start(replace(settings, otlp_endpoint=f"{collector.url}/v1/traces"), worker)
    assert router.http.post("/v1/completions", json=BODY).status_code == 400
    router.close()
    _, span = collector.spans.get(timeout=10)
    assert values(span)["error.type"] == "RequestError"
    assert values(span)["http.response.status_code"] == 400
    assert not span.parent_span_id


def test_a_collector_that_is_not_there_holds_nobody_up(start, settings, worker, collector):
    collector.close()
    router = start(replace(settings, otlp_endpoint=collector.url), worker)
    assert router.http.post("/v1/completions", json=BODY).status_code == 200
    started = time.monotonic()
    router.close()
    assert time.monotonic() - started < 10


def test_spans_without_their_packages_are_refused_at_the_start(monkeypatch):
    find = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return find(name, *args, **kwargs)

    monkeypatch.delitem(__import__("sys").modules, "router.telemetry.otlp", raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"afd\[otel\]"):
        tracing.open_spans("http://127.0.0.1:1", "tiny")


def test_without_an_endpoint_there_are_no_spans():
    assert tracing.open_spans("", "tiny") is None
