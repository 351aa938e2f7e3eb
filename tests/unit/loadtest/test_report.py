"""The report: every chart is well-formed, the figures are the summary's, and series add up to what happened."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest

from afd.loadtest import measure, report, result, series, svg, window
from afd.loadtest.busy import Samples
from afd.loadtest.cost import Cost, Theory
from afd.loadtest.drive import Run
from afd.loadtest.prices import Worker
from afd.loadtest.result import Result
from afd.loadtest.session import Outcome
from afd.loadtest.slo import Slo
from afd.loadtest.sweep import Found, Probe
from tests.unit.loadtest.records import even, record

COST = Cost(
    2.8, 1.9, 0.3, 1.0, 0.6, (Theory("attention", "H20", 0.01, 0.02), Theory("ffn", "H800", 0.03, 0.05)), 0.04, 0.07
)
SHARES = {Worker("attention", 0): {"attention": 0.6, "wait": 0.4}, Worker("ffn", 0): {"ffn": 0.7, "idle": 0.3}}


def outcome() -> Outcome:
    records = [even(float(i), 0.5, 0.1, 11) for i in range(10)]
    records.append(record(9.5, [], status="429"))
    run = Run(0, records, sent_all_s=9.5)
    found = window.find(run, window.WarmUp())
    return Outcome(run, measure.measure(run, found, Slo.parse("ttft=1s")), Samples(), stopped=False)


def test_a_full_report_has_every_section_and_well_formed_charts() -> None:
    sweep = Found(2.0, True, (Probe(2.0, 1.0, True), Probe(4.0, 0.5, False)))
    page = report.page(Result({"model": "toy & co"}, outcome(), SHARES, COST, sweep), "today")
    for title in (
        "Latency",
        "Over time",
        "How latencies are spread",
        "Cost",
        "Where the workers",
        "Rates tried",
        "Run",
    ):
        assert f"<h2>{title}" in page
    assert "toy &amp; co" in page
    charts = re.findall(r"<svg.*?</svg>", page)
    assert len(charts) == 8
    for chart in charts:
        for element in ET.fromstring(chart).iter():
            assert not any(word in str(element.attrib) for word in ("nan", "inf"))


def test_a_run_of_which_nothing_came_back_has_a_report_too() -> None:
    run = Run(4, [record(0.0, [], status="503")], 0.0)
    nothing = measure.measure(run, window.find(run, window.WarmUp()), None)
    page = report.page(Result({"model": "toy"}, Outcome(run, nothing, Samples(), stopped=False), {}), "today")
    for chart in re.findall(r"<svg.*?</svg>", page):
        ET.fromstring(chart)
    assert "<h2>Cost" not in page
    assert "503: 1, for example: it was 503" in page


def test_costs_are_rows_of_measured_and_theory() -> None:
    rows = Result({}, outcome(), SHARES, COST).costs()
    assert rows == [
        ("attention (H20 in theory)", "$0.3", "$0.01", "$0.02"),
        ("ffn (H800 in theory)", "$1", "$0.03", "$0.05"),
        ("idle", "$0.6", "", ""),
        ("total", "$1.9", "$0.04", "$0.07"),
    ]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Found(None, False, (Probe(0.5, 0.0, False),)), "no rate down to 0.5"),
        (Found(8.0, False, (Probe(8.0, 1.0, True),)), "every rate up to 8"),
        (Found(3.21, True, (Probe(3.21, 1.0, True),)), "3.21 requests/s is the highest"),
    ],
)
def test_a_sweeps_end_is_a_sentence(found: Found, words: str) -> None:
    assert words in result.sweep_sentence(found)


def test_rates_over_time_hold_every_token_once() -> None:
    records = [even(float(i), 0.5, 0.1, 11) for i in range(10)]
    points = series.output_rates(records, 10.5)
    step_s = points[1][0] - points[0][0]
    assert sum(rate * step_s for _, rate in points) == pytest.approx(110, rel=0.03)


def test_requests_in_flight_are_those_sent_and_not_ended() -> None:
    points = dict(series.in_flight([record(0.0, [6.0]), record(3.0, [12.0])], 12.0))
    assert [points[at] for at in (0.0, 2.0, 3.0, 5.9, 6.0, 11.9, 12.0)] == [1, 1, 2, 2, 1, 1, 0]


@pytest.mark.parametrize("count", [1, 5, 200, 5000])
def test_a_distribution_rises_from_nothing_to_all(count: int) -> None:
    points = series.cdf([float(value) for value in range(count)])
    assert points[0] == (0.0, 0.0)
    assert points[-1] == (count - 1, 100.0)
    assert points == sorted(points)
    assert len(points) <= 202
    assert series.cdf([]) == []


@pytest.mark.parametrize("most", [0.0007, 0.3, 1, 4, 7.5, 99, 100, 101, 12345, math.nan, 0, math.inf])
def test_ticks_are_few_and_reach_the_largest_value(most: float) -> None:
    found = svg.ticks(most)
    assert 4 <= len(found) <= 8
    assert found[0] == 0
    if 0 < most < math.inf:
        assert found[-2] < most <= found[-1] * (1 + 1e-9)
