"""The sweep on a server that is simulated: arrivals queue for places, answers take a fixed time."""

from __future__ import annotations

import asyncio
import heapq
from itertools import takewhile

import pytest

from afd.loadtest import arrivals, measure, sweep, window
from afd.loadtest.drive import Run
from afd.loadtest.slo import Slo
from afd.loadtest.sweep import Probe
from tests.unit.loadtest.records import even

PLACES, TOKENS, STEP_S = 8, 20, 0.05  # so a request takes a second, and eight fit at a time
SECONDS = 200.0


def simulate(rate: float, kind: str) -> Run:
    """Requests that come at `rate` wait for the first place that is free."""
    free_at = [0.0] * PLACES
    records = []
    for sent_s in takewhile(lambda at: at < SECONDS, arrivals.steady(rate, kind, 1.0, seed=1)):
        begin_s = max(sent_s, heapq.heappop(free_at))
        heapq.heappush(free_at, begin_s + TOKENS * STEP_S)
        records.append(even(sent_s, begin_s - sent_s + STEP_S, STEP_S, TOKENS))
    return Run(0, records, sent_all_s=SECONDS)


def find(slo: str, first: float, kind: str = "constant") -> sweep.Found:
    async def probe(rate: float) -> Probe:
        run = simulate(rate, kind)
        goodput = measure.measure(run, window.find(run, window.WarmUp()), Slo.parse(slo)).goodput
        assert goodput is not None
        return Probe(rate, goodput.share, goodput.share >= 0.9)

    return asyncio.run(sweep.highest(probe, first))


@pytest.mark.parametrize("first", [0.1, 1.0, 7.0, 100.0])
def test_it_finds_the_servers_capacity_from_wherever_it_begins(first: float) -> None:
    found = find("ttft=200ms", first)
    assert found.rate == pytest.approx(PLACES / (TOKENS * STEP_S), rel=0.06)
    assert found.bounded
    met = [probe.rate for probe in found.probes if probe.met]
    assert max(met) == found.rate
    assert min(probe.rate for probe in found.probes if not probe.met) <= sweep.PRECISION * found.rate
    assert len(found.probes) <= 15


def test_random_arrivals_leave_less_than_the_capacity() -> None:
    """Bursts wait, so the same limit is met up to a lower rate."""
    found = find("ttft=200ms", 1.0, "poisson")
    assert found.rate is not None
    assert 4.0 < found.rate < 7.6


def test_objectives_that_no_rate_meets_give_none() -> None:
    found = find("tpot=10ms", 1.0)
    assert found.rate is None
    assert len(found.probes) == sweep.MOST_STEPS + 1


def test_objectives_that_every_rate_meets_say_that_no_limit_was_found() -> None:
    found = asyncio.run(sweep.highest(always, 1.0))
    assert (found.rate, found.bounded) == (2.0**sweep.MOST_STEPS, False)


async def always(rate: float) -> Probe:
    return Probe(rate, 1.0, True)
