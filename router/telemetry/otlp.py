"""Spans sent over OTLP/HTTP with the OpenTelemetry SDK (pip install 'afd[otel]'). Imported only when wanted."""

from __future__ import annotations

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from router.http.exchange import Exchange
from router.telemetry import tracing

_TRACES = "/v1/traces"


class OtlpSpans:
    """See router.tracing.Spans. Spans wait in a bounded queue for a thread that sends them in batches."""

    def __init__(self, endpoint: str, model: str) -> None:
        """`endpoint` is the collector, with or without the path for traces."""
        base = endpoint.rstrip("/").removesuffix(_TRACES)
        exporter = OTLPSpanExporter(endpoint=base + _TRACES, timeout=tracing.FLUSH_S)
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "afd-router"}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("afd.router")
        self._propagator = TraceContextTextMapPropagator()
        self._model = model

    def record(self, ended: Exchange) -> None:
        """See Spans."""
        context = self._propagator.extract({"traceparent": ended.traceparent, "tracestate": ended.tracestate})
        span = self._tracer.start_span(
            f"{ended.operation} {self._model}",
            context=context,
            kind=SpanKind.SERVER,
            attributes=tracing.attributes(ended, self._model),
            start_time=ended.began_ns,
        )
        if ended.error and ended.status != 400:
            span.set_status(Status(StatusCode.ERROR))
        span.end(ended.began_ns + int(ended.total_s * 1e9))

    def close(self) -> None:
        """See Spans."""
        self._provider.force_flush(int(tracing.FLUSH_S * 1e3))
        self._provider.shutdown()
