"""What a run adds up to: percentiles against numpy's, rates over the steady window, objectives, errors."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from afd.errors import ConfigError
from afd.loadtest import measure, window
from afd.loadtest.drive import Run
from afd.loadtest.measure import Spread, percentile
from afd.loadtest.record import CANCELLED
from afd.loadtest.slo import Slo
from afd.loadtest.window import WarmUp, Window
from tests.unit.loadtest.records import even, record

WHOLE = Window(0.0, 100.0, 0.0, steady=True)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 99, 1000])
def test_a_spread_is_numpys(count: int) -> None:
    values = [random.Random(count).lognormvariate(0, 1) for _ in range(count)]
    found = Spread.of(values)
    assert found.count == count
    assert found.mean == pytest.approx(np.mean(values))
    assert [found.p50, found.p90, found.p95, found.p99] == pytest.approx(np.percentile(values, [50, 90, 95, 99]))
    for percent in (0, 1, 33.3, 100):
        assert percentile(sorted(values), percent) == pytest.approx(np.percentile(values, percent))


def test_a_spread_of_nothing_is_no_number() -> None:
    found = Spread.of([])
    assert found.count == 0
    assert all(map(math.isnan, (found.mean, found.p50, found.p99)))


def test_latencies_are_those_of_their_definitions() -> None:
    r = record(1.0, [1.5, 1.6, 1.8, 2.3])
    assert r.ttft_s == pytest.approx(0.5)
    assert r.itls_s == pytest.approx([0.1, 0.2, 0.5])
    assert r.tpot_s == pytest.approx(0.8 / 3)
    assert r.e2e_s == pytest.approx(1.3)


def test_events_of_several_tokens_count_as_the_server_counts() -> None:
    """Eight tokens in four events: twice as many tokens in every stretch, and half the time for each."""
    r = record(0.0, [1.0, 2.0, 3.0, 4.0], tokens=8)
    assert r.tpot_s == pytest.approx(3 / 7)
    assert measure.output_rate([r], Window(1.5, 3.5, 0.0, steady=True)) == pytest.approx(4 / 2.0)


def test_one_token_has_no_time_per_token() -> None:
    assert record(0.0, [1.0]).tpot_s is None


def test_a_closed_loops_window_lies_between_the_last_first_token_and_the_first_empty_place() -> None:
    first = [even(0.0, 0.5, 0.1, 11), even(0.0, 0.7, 0.1, 16)]  # end at 1.5 and 2.2
    second = [even(1.5, 0.5, 0.1, 16), even(2.2, 0.5, 0.1, 11)]  # end at 3.5 and 3.7
    found = window.find(Run(2, [*first, *second], sent_all_s=2.2), WarmUp())
    assert (found.start_s, found.end_s) == pytest.approx((0.7, 3.5))
    assert found.steady
    assert len(found.counted([*first, *second])) == 4


def test_a_single_wave_is_steady_while_all_decode() -> None:
    wave = [even(0.0, 0.2 * i, 0.1, 21) for i in range(1, 5)]
    found = window.find(Run(4, wave, sent_all_s=0.0), WarmUp())
    assert (found.start_s, found.end_s) == pytest.approx((0.8, 2.2))
    assert measure.output_rate(wave, found) == pytest.approx(4 / 0.1, rel=0.08)


def test_an_open_loops_window_lies_between_the_first_end_and_the_last_sending() -> None:
    records = [even(float(i), 0.5, 0.1, 11) for i in range(10)]
    found = window.find(Run(0, records, sent_all_s=9.0), WarmUp())
    assert (found.start_s, found.end_s) == pytest.approx((1.5, 9.0))
    m = measure.measure(Run(0, records, 9.0), found, None)
    assert m.requests_per_s == pytest.approx(1.0, rel=0.04)
    assert m.output_tokens_per_s == pytest.approx(11.0, rel=0.08)
    assert m.input_tokens_per_s == pytest.approx(10.0, rel=0.04)
    assert m.in_flight == pytest.approx(1.5, rel=0.05)


@pytest.mark.parametrize(("warm_up", "start_s", "counted"), [("3s", 3.0, 7), ("4", 4.5, 5), ("0", 1.5, 10)])
def test_what_was_sent_in_the_warm_up_counts_nowhere(warm_up: str, start_s: float, counted: int) -> None:
    records = [even(float(i), 0.5, 0.1, 11) for i in range(10)]
    found = window.find(Run(0, records, sent_all_s=9.0), WarmUp.parse(warm_up))
    assert found.start_s == pytest.approx(start_s)
    assert len(found.counted(records)) == counted


def test_without_steady_load_the_window_is_the_whole_run() -> None:
    one = [even(0.25, 0.5, 0.1, 11)]
    found = window.find(Run(0, one, sent_all_s=0.25), WarmUp())
    assert (found.start_s, found.end_s, found.steady) == (0.25, pytest.approx(1.75), False)
    assert window.find(Run(4, [], 0.0), WarmUp()).seconds == 0.0


def test_a_warm_up_that_outlasts_the_run_leaves_nothing_counted() -> None:
    records = [even(float(i), 0.5, 0.1, 11) for i in range(3)]
    found = window.find(Run(0, records, sent_all_s=2.0), WarmUp(requests=5))
    assert not found.steady
    assert found.counted(records) == []


@pytest.mark.parametrize("text", ["", "s", "-1s", "x", "1.5", "-2", "nans", "infs"])
def test_a_warm_up_that_cannot_be_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="--warmup"):
        WarmUp.parse(text)


def test_objectives_are_read_in_their_units() -> None:
    assert Slo.parse("ttft=500ms,tpot=50ms,e2e=10s") == Slo(0.5, 0.05, 10.0)
    assert Slo.parse(" tpot=800us ") == Slo(tpot_s=pytest.approx(0.0008))
    assert str(Slo.parse("ttft=1.5s")) == "ttft ≤ 1500 ms"


@pytest.mark.parametrize(
    "text", ["", "ttft", "ttft=5", "ttft=ms", "itl=5ms", "ttft=1s,ttft=2s", "tpot=-5ms", "e2e=1..2s"]
)
def test_objectives_that_cannot_be_are_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="--slo"):
        Slo.parse(text)


def test_goodput_counts_only_what_was_answered_within_all_limits() -> None:
    records = [
        even(0.0, 0.4, 0.04, 26),  # good
        even(1.0, 0.6, 0.04, 26),  # first token late
        even(2.0, 0.4, 0.06, 26),  # tokens slow
        record(3.0, [3.4], status="429"),
        even(4.0, 0.4, 0.04, 1),  # one token: no time per token to miss
    ]
    m = measure.measure(Run(0, records, 5.0), Window(0.0, 10.0, 0.0, steady=True), Slo.parse("ttft=500ms,tpot=50ms"))
    assert m.goodput is not None
    assert m.goodput.share == pytest.approx(2 / 5)
    assert m.goodput.requests_per_s == pytest.approx(0.2)
    assert m.goodput.output_tokens_per_s == pytest.approx(2.7)


def test_errors_are_counted_by_status_and_what_this_client_ended_is_none() -> None:
    statuses = ["ok", "429", "429", "timeout", CANCELLED]
    records = [record(float(i), [i + 0.5], status=status) for i, status in enumerate(statuses)]
    m = measure.measure(Run(0, records, 5.0), WHOLE, None)
    assert {status: (e.count, e.example) for status, e in m.errors.items()} == {
        "429": (2, "it was 429"),
        "timeout": (1, "it was timeout"),
    }
    assert (m.sent, m.answered) == (5, 1)
    assert m.ttft_s.count == 1


def test_the_mean_context_is_what_a_decoded_token_saw() -> None:
    long, short = record(0.0, [1.0, 2.0, 3.0], inputs=100), record(0.0, [1.0], inputs=10)
    m = measure.measure(Run(0, [long, short], 1.0), WHOLE, None)
    assert m.context == pytest.approx((100 + 101 + 102 + 10) / 4)
