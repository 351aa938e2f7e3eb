"""What the metrics make of the workers' totals: shares of the last seconds, and costs."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from afd.rpc.convert import AttentionStatus
from afd.types import ActivityTotals, HistogramTotals, Role, WorkerTotals, WorkerView
from router.telemetry.metrics import Metrics
from router.telemetry.shares import RecentShares


def view(role: Role, rank: int = 0, generated: int = 0, experts: tuple[int, int] = (0, 0), **seconds: float):
    activities = {name: ActivityTotals(value, 1, 0, 0) for name, value in seconds.items()}
    totals = WorkerTotals(activities, HistogramTotals((), (0,), 0.0), *experts)
    return WorkerView(role, rank, "ready", counters={"generated_tokens": generated}, totals=totals)


class Watch:
    """Looks at what it is told, when it is told."""

    def __init__(self, **usd_per_hour: float) -> None:
        self.now = 100.0
        self._registry = CollectorRegistry()
        prices = {Role(role): usd for role, usd in usd_per_hour.items()}
        self._shares = RecentShares(prices, clock=lambda: self.now)
        self._registry.register(self._shares)

    def look(self, now: float, *views: WorkerView):
        self.now, self._shares.views = now, views
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in self._registry.collect()
            for sample in family.samples
        }


def test_shares_are_of_the_time_since_a_look_some_seconds_ago():
    watch = Watch()
    first = watch.look(100.0, view(Role.ATTENTION, attention=30.0, wait=10.0, idle=60.0))
    assert first["afd_busy_share", "attention", "0"] == pytest.approx(0.3)
    later = watch.look(106.0, view(Role.ATTENTION, attention=33.0, wait=12.0, idle=61.0))
    assert later["afd_busy_share", "attention", "0"] == pytest.approx(0.5)
    assert later["afd_bubble_share", "attention", "0", "wait"] == pytest.approx(2 / 6)
    assert later["afd_bubble_share", "attention", "0", "idle"] == pytest.approx(1 / 6)
    assert later["afd_bubble_share", "attention", "0", "gather"] == 0
    soon = watch.look(106.5, view(Role.ATTENTION, attention=33.5, wait=12.0, idle=61.0))
    assert soon["afd_busy_share", "attention", "0"] == pytest.approx(3.5 / 6.5), "half a second alone says little"
    last = watch.look(112.0, view(Role.ATTENTION, attention=33.5, wait=12.0, idle=66.5))
    assert last["afd_busy_share", "attention", "0"] == pytest.approx(0.5 / 6)


def test_a_worker_that_was_started_anew_counts_from_its_start_and_one_that_left_is_gone():
    watch = Watch()
    watch.look(100.0, view(Role.FFN, ffn=50.0, idle=50.0), view(Role.FFN, 1, ffn=1.0))
    found = watch.look(110.0, view(Role.FFN, ffn=1.0, idle=3.0))
    assert found["afd_busy_share", "ffn", "0"] == pytest.approx(0.25)
    assert ("afd_busy_share", "ffn", "1") not in found


def test_tokens_per_expert_call_are_of_the_calls_that_were_counted():
    watch = Watch()
    first = watch.look(100.0, view(Role.FFN, ffn=1.0))
    assert ("afd_tokens_per_expert_call", "0") not in first
    watch.look(101.0, view(Role.FFN, experts=(10, 20), ffn=2.0))
    found = watch.look(107.0, view(Role.FFN, experts=(20, 100), ffn=8.0))
    assert found["afd_tokens_per_expert_call", "0"] == pytest.approx(8.0)


def test_costs_are_split_into_busy_attention_busy_ffn_and_waiting():
    watch = Watch(attention=3.6, ffn=7.2)  # 0.001 and 0.002 USD a second
    nothing = watch.look(100.0, view(Role.ATTENTION, idle=10.0), view(Role.FFN, idle=10.0))
    assert nothing["afd_cost_usd_total", "attention"] == pytest.approx(0.01)
    assert not [key for key in nothing if "million" in key[0]], "without tokens there is no price of one"
    found = watch.look(
        110.0,
        view(Role.ATTENTION, generated=1000, attention=6.0, idle=14.0),
        view(Role.FFN, ffn=2.0, idle=18.0),
    )
    assert found["afd_cost_usd_per_million_tokens", "attention"] == pytest.approx(6.0)
    assert found["afd_cost_usd_per_million_tokens", "ffn"] == pytest.approx(4.0)
    assert found["afd_cost_usd_per_million_tokens", "idle"] == pytest.approx(4.0 + 16.0)
    assert found["afd_cost_usd_total", "ffn"] == pytest.approx(0.04)


def test_without_prices_nothing_is_said_of_costs_and_with_them_metrics_are():
    workers = [view(Role.ATTENTION, generated=5, attention=1.0), view(Role.FFN, ffn=1.0)]
    assert b"afd_cost" not in Metrics().render([], workers)
    text = Metrics({Role.ATTENTION: 1.0, Role.FFN: 1.0}).render([], workers).decode()
    assert 'afd_cost_usd_per_million_tokens{part="idle"} 0.0' in text
    assert 'afd_cost_usd_total{role="ffn"}' in text


def test_kv_usage_is_a_share():
    text = Metrics().render([AttentionStatus(1, blocks_used=16, blocks_total=64), AttentionStatus(2)]).decode()
    assert 'afd_kv_cache_usage_perc{attention_rank="1"} 0.25' in text
    assert 'afd_kv_cache_usage_perc{attention_rank="2"} 0.0' in text
