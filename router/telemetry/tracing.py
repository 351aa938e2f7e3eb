"""Spans of requests for an OpenTelemetry collector: whether there are any, and what of a request they say."""

from __future__ import annotations

import importlib
from typing import Protocol

from afd.errors import ConfigError
from router.http.exchange import Exchange

FLUSH_S = 2.0  # longest wait for a collector at the end


class Spans(Protocol):
    """Records finished requests. Never blocks; what a collector does not take in time is dropped."""

    def record(self, ended: Exchange) -> None:
        """One span, from the request's arrival to now."""

    def close(self) -> None:
        """Sends what is left, for at most FLUSH_S seconds."""


def open_spans(endpoint: str, model: str) -> Spans | None:
    """Spans of `model`, sent to the URL `endpoint` (OTLP over HTTP); "": none. Raises ConfigError without packages."""
    if not endpoint:
        return None
    try:
        otlp = importlib.import_module("router.telemetry.otlp")  # by name: optional, and slow to import
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        raise ConfigError(
            f"spans for {endpoint} (router.otlp_endpoint or OTEL_EXPORTER_OTLP_ENDPOINT) need OpenTelemetry: "
            f"pip install 'afd[otel]', or leave the endpoint out"
        ) from error
    spans: Spans = otlp.OtlpSpans(endpoint, model)
    return spans


def attributes(ended: Exchange, model: str) -> dict[str, str | int | float | bool | tuple[str, ...]]:
    """By OpenTelemetry's conventions for generative AI, and vLLM's names for latencies. No prompts, no answers."""
    found: dict[str, str | int | float | bool | tuple[str, ...]] = {
        "gen_ai.operation.name": ended.operation,
        "gen_ai.provider.name": "afd",
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.response.id": ended.answer_id,
        "gen_ai.response.finish_reasons": tuple(ended.finish_reasons),
        "gen_ai.request.temperature": ended.temperature,
        "gen_ai.request.max_tokens": ended.max_tokens,
        "gen_ai.request.stream": ended.streamed,
        "gen_ai.usage.input_tokens": ended.num_prompt_tokens,
        "gen_ai.usage.output_tokens": ended.num_generated,
        "gen_ai.latency.e2e": ended.total_s,
        "http.request.method": ended.method,
        "http.route": ended.path,
        "http.response.status_code": ended.status,
        "afd.request_id": ended.request_id,
    }
    if ended.first_token_s is not None:
        found["gen_ai.latency.time_to_first_token"] = ended.first_token_s
    if ended.queue_s is not None:
        found["gen_ai.latency.time_in_queue"] = ended.queue_s
    if ended.error:
        found["error.type"] = ended.error
    return found
