"""What the router counts, in Prometheus' words. Each router has a registry of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TypedDict

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.registry import Collector

from afd.rpc.convert import AttentionStatus
from afd.types import Role, WorkerView
from router.telemetry.counts import Count, Spread
from router.telemetry.shares import RecentShares
from router.telemetry.worker_metrics import WorkerMetrics

_LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
_LONG_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 240.0, 480.0)


class Buckets(TypedDict):
    """A histogram: counts[i] values were at most bounds_s[i], which is None for the last: all of them."""

    bounds_s: list[float | None]
    counts: list[float]


class Metrics:
    """A "request" here is one choice, as it is for the workers. Latencies are in seconds, seen from the router."""

    def __init__(self, usd_per_hour: Mapping[Role, float] = MappingProxyType({})) -> None:
        """`usd_per_hour`: what a worker of each role costs; {}: costs are not counted."""
        registry = self._registry = CollectorRegistry()
        self.prompt_tokens = Counter("afd_prompt_tokens", "Prompt tokens of requests taken.", registry=registry)
        self.generation_tokens = Count("afd_generation_tokens", "Tokens generated.", registry)
        self.time_to_first_token = Histogram(
            "afd_time_to_first_token_seconds",
            "From the request to its first token.",
            buckets=(*_LATENCY_S, 30.0, 60.0),
            registry=registry,
        )
        self.inter_token_latency = Spread(
            "afd_inter_token_latency_seconds", "Between two tokens of a request.", _LATENCY_S, registry
        )
        self.time_per_output_token = Histogram(
            "afd_request_time_per_output_token_seconds",
            "A request's mean time per token after its first.",
            buckets=_LATENCY_S,
            registry=registry,
        )
        self.queue_time = Histogram(
            "afd_request_queue_time_seconds",
            "From a worker's taking a request to the request's first step, as the worker measured it.",
            buckets=(*_LATENCY_S, 30.0, 60.0),
            registry=registry,
        )
        self._e2e = Histogram(
            "afd_e2e_request_latency_seconds",
            "From the request to its last token.",
            buckets=_LONG_S,
            registry=registry,
        )
        self._success = Counter(
            "afd_request_success",
            "Requests ended, by reason: stop, length, tool_calls, abort (the client left), timeout or error.",
            ["finished_reason"],
            registry=registry,
        )
        self.retries = Counter(
            "afd_request_retries",
            "Requests sent to another worker because the first was lost, or refused, before their first token.",
            registry=registry,
        )
        self.replays = Counter(
            "afd_replays",
            "Requests that went on at another worker behind the tokens they had, because theirs was lost.",
            registry=registry,
        )
        self.http_errors = Counter(
            "afd_http_errors",
            "Error answers to any request, by HTTP status; of one that ends a stream, the status it would have had. "
            "499: the client left while it was still sending.",
            ["status"],
            registry=registry,
        )
        self._workers = WorkerMetrics()
        self._shares = RecentShares(usd_per_hour)
        registry.register(self._workers)
        registry.register(self._shares)
        self._by_worker = {
            field: Gauge(name, text, ["attention_rank"], registry=registry)
            for field, name, text in (
                ("running", "afd_requests_running", "Requests that hold KV blocks."),
                ("waiting", "afd_requests_waiting", "Requests in the worker's queue."),
                ("blocks_used", "afd_kv_blocks_used", "KV blocks in use."),
                ("blocks_total", "afd_kv_blocks_total", "KV blocks there are."),
            )
        }
        self._kv_usage = Gauge(
            "afd_kv_cache_usage_perc",
            "Share of the KV blocks that is in use; 1 is all.",
            ["attention_rank"],
            registry=registry,
        )

    def add(self, more: Collector) -> None:
        """Others' counts, which `render` asks for each time."""
        self._registry.register(more)

    def finished(self, reason: str, seconds: float) -> None:
        """A request ended `seconds` after it came."""
        self._success.labels(reason).inc()
        self._e2e.observe(seconds)

    def counted(self) -> dict[str, object]:
        """Since the start, as JSON knows it: tokens, and latencies as `Buckets`."""
        return {
            "generated_tokens": self.generation_tokens.value,
            "time_to_first_token": _buckets(self.time_to_first_token),
            "inter_token_latency": _buckets(self.inter_token_latency),
        }

    def render(self, statuses: Sequence[AttentionStatus], workers: Sequence[WorkerView] = ()) -> bytes:
        """The text format. Gauges of workers are set from `statuses`, what their timelines add up to from `workers`;
        workers that are gone disappear."""
        self._workers.views = self._shares.views = workers
        for gauge in (*self._by_worker.values(), self._kv_usage):
            gauge.clear()
        self._workers.statuses = statuses
        for status in statuses:
            for field, gauge in self._by_worker.items():
                gauge.labels(str(status.attention_rank)).set(getattr(status, field))
            usage = status.blocks_used / status.blocks_total if status.blocks_total else 0.0
            self._kv_usage.labels(str(status.attention_rank)).set(usage)
        return generate_latest(self._registry)


def _buckets(histogram: Collector) -> Buckets:
    samples = [s for family in histogram.collect() for s in family.samples if s.name.endswith("_bucket")]
    bounds = [float(sample.labels["le"]) for sample in samples]
    return {
        "bounds_s": [bound if math.isfinite(bound) else None for bound in bounds],
        "counts": [sample.value for sample in samples],
    }
