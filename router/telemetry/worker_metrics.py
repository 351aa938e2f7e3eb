"""What the workers' timelines add up to, in Prometheus' words: where their time went, and how much went through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from afd.rpc.convert import AttentionStatus
from afd.types import ActivityTotals, HistogramTotals, Role, WorkerTotals, WorkerView

_NOTHING = ActivityTotals(0.0, 0, 0, 0)
_COUNTED = "in every 61st call of experts."


class WorkerMetrics(Collector):
    """`views`: the workers as the controller saw them last; those that have not said anything yet are left out.
    `statuses`: what attention workers said last to this router."""

    def __init__(self) -> None:
        self.statuses: Sequence[AttentionStatus] = ()
        self.views: Sequence[WorkerView] = ()

    def collect(self) -> Iterator[Metric]:
        workers = [(view, view.totals) for view in self.views if view.totals is not None]
        yield from _every_worker(workers)
        attention = [(v.label, totals) for v, totals in workers if v.role is Role.ATTENTION]
        ffn = [(v.label, totals) for v, totals in workers if v.role is Role.FFN]
        yield from _attention(attention)
        yield from _ffn(ffn)
        yield from _prefix_cache(self.statuses)


def _every_worker(workers: list[tuple[WorkerView, WorkerTotals]]) -> Iterator[Metric]:
    text = "Where each worker's time went; over all activities it is the time since the worker's loop started."
    seconds = CounterMetricFamily("afd_activity_seconds", text, labels=["role", "rank", "activity"])
    text = "Tensors taken off the wire: dispatches by FFN workers, combines by attention workers."
    wire = CounterMetricFamily("afd_wire_bytes", text, labels=["role", "rank"])
    for view, totals in workers:
        for activity, total in totals.activities.items():
            seconds.add_metric([view.role.value, view.label, activity], total.seconds)
        wire.add_metric([view.role.value, view.label], sum(t.wire_bytes for t in totals.activities.values()))
    yield from (seconds, wire)


def _attention(workers: list[tuple[str, WorkerTotals]]) -> Iterator[Metric]:
    dispatches = CounterMetricFamily("afd_dispatches", "Dispatches written.", labels=["attention_rank"])
    tokens = CounterMetricFamily("afd_dispatched_tokens", "Tokens in dispatches.", labels=["attention_rank"])
    steps = HistogramMetricFamily("afd_step_seconds", "A microbatch's steps.", labels=["attention_rank"])
    for rank, totals in workers:
        dispatch = totals.activities.get("dispatch", _NOTHING)
        dispatches.add_metric([rank], dispatch.calls)
        tokens.add_metric([rank], dispatch.tokens)
        _add(steps, rank, totals.work)
    yield from (dispatches, tokens, steps)


def _ffn(workers: list[tuple[str, WorkerTotals]]) -> Iterator[Metric]:
    calls = CounterMetricFamily(
        "afd_ffn_calls", "Layers computed, each for one or more dispatches.", labels=["ffn_rank"]
    )
    answers = CounterMetricFamily("afd_ffn_dispatches", "Dispatches taken.", labels=["ffn_rank"])
    expert_calls = CounterMetricFamily("afd_expert_calls", f"Experts that had tokens {_COUNTED}", labels=["ffn_rank"])
    expert_tokens = CounterMetricFamily("afd_expert_tokens", f"Tokens that experts had {_COUNTED}", labels=["ffn_rank"])
    sizes = HistogramMetricFamily("afd_ffn_call_tokens", "Tokens in an FFN call.", labels=["ffn_rank"])
    for rank, totals in workers:
        calls.add_metric([rank], totals.activities.get("ffn", _NOTHING).calls)
        answers.add_metric([rank], totals.activities.get("receive", _NOTHING).calls)
        expert_calls.add_metric([rank], totals.expert_calls)
        expert_tokens.add_metric([rank], totals.expert_tokens)
        _add(sizes, rank, totals.work)
    yield from (calls, answers, expert_calls, expert_tokens, sizes)


def _prefix_cache(statuses: Sequence[AttentionStatus]) -> Iterator[Metric]:
    text = "Tokens of requests admitted by the worker."
    queries = CounterMetricFamily("afd_prefix_cache_queries", text, labels=["attention_rank"])
    text = "Those of them whose KV was there already."
    hits = CounterMetricFamily("afd_prefix_cache_hits", text, labels=["attention_rank"])
    for status in statuses:
        queries.add_metric([str(status.attention_rank)], status.prefix_queries)
        hits.add_metric([str(status.attention_rank)], status.prefix_hits)
    yield from (queries, hits)


def _add(family: HistogramMetricFamily, rank: str, histogram: HistogramTotals) -> None:
    """Prometheus' buckets hold everything up to their bound."""
    buckets, below = [], 0
    for bound, count in zip((*map(str, histogram.bounds), "+Inf"), histogram.counts, strict=True):
        below += count
        buckets.append((bound, below))
    family.add_metric([rank], buckets=buckets, sum_value=histogram.sum)
