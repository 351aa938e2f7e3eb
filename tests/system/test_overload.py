"""Four times more requests than the server can answer, for OVERLOAD_S seconds; by default briefly."""

from __future__ import annotations

import asyncio
import os

import pytest

from tests.bench.soak import overload

pytestmark = pytest.mark.smollm2

SECONDS = float(os.environ.get("OVERLOAD_S", "10"))
NOISE_S = 2.0  # what a busy machine may add to a deadline
MOST_GROWN_MIB = 48


def test_overload_is_refused_in_time_and_leaves_nothing_behind() -> None:
    with overload.server() as running:
        report = asyncio.run(overload.measure(running, SECONDS, factor=4.0))
    print(f"capacity {report.capacity:.1f}/s, offered {report.offered:.1f}/s: {report.counts}, {report.grown_mib} MiB")
    assert report.offered > 2.5 * report.capacity, "no overload, so there is nothing to show"
    assert set(report.counts) <= {"done", "429", "504", "late"}, report.counts
    assert all(outcome.seconds < outcome.deadline_s + NOISE_S for outcome in report.outcomes)
    refused = [outcome for outcome in report.outcomes if outcome.how == "429"]
    assert len(refused) > len(report.outcomes) / 3
    assert all(int(outcome.retry_after) >= 1 for outcome in refused)
    assert max(outcome.seconds for outcome in refused) < NOISE_S, "a refusal comes at once"
    assert report.counts["done"] / SECONDS > 0.4 * report.capacity, "overload must not keep the server from its work"
    assert max(report.grown_mib.values()) < MOST_GROWN_MIB, report.grown_mib
    assert report.left_running == 0
    assert report.alone_after_s < 2 * report.alone_before_s + 0.3
