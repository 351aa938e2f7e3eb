"""What the router says of the workers' time: the trace, the summary, the metrics and the status."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from scripted_worker import cluster

from afd.pipeline.timeline import Activity, Timeline, Timelines
from afd.types import Role, WorkerView
from router.app import create_app
from router.settings import RouterSettings
from router.telemetry.debug import MAX_EVENTS
from router.telemetry.metrics import Metrics
from tests import chrome_trace
from tests.unit.pipeline.recordings import one_layer

Collect = Callable[[float, int], Timelines]


def get(settings: RouterSettings, path: str, collect: Collect | None = None) -> httpx.Response:
    view = cluster()
    app = create_app(settings, lambda: view, collect) if collect else create_app(settings, lambda: view)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://router") as client:
            return await client.get(path)

    return asyncio.run(ask())


def test_the_trace_and_its_summary_are_of_the_time_asked_for(settings: RouterSettings) -> None:
    asked: list[tuple[float, int, str]] = []

    def collect(seconds: float, max_events: int) -> Timelines:
        asked.append((seconds, max_events, threading.current_thread().name))
        return one_layer()

    trace = get(settings, "/debug/timeline?seconds=2.5", collect)
    assert trace.headers["content-type"] == "application/json"
    assert chrome_trace.check(trace.json())["s"]
    summary = get(settings, "/debug/timeline?format=summary", collect).json()
    assert summary["efficiency"] == pytest.approx(0.31)
    assert summary == trace.json()["otherData"]["summary"] | {"asked_s": 5.0}
    assert [(seconds, most) for seconds, most, _ in asked] == [(2.5, MAX_EVENTS), (5.0, MAX_EVENTS)]
    assert threading.main_thread().name not in [thread for _, _, thread in asked], "others' tokens would wait"


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("seconds=0", "seconds is '0'; it must be a number from 0.1 to 60"),
        ("seconds=1e-9", "seconds is '1e-9'"),
        ("seconds=61", "seconds is '61'"),
        ("seconds=nan", "seconds is 'nan'"),
        ("seconds=soon", "seconds is 'soon'"),
        ("format=svg", "format is 'svg'; known are trace, summary"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_a_sentence(settings: RouterSettings, query: str, sentence: str) -> None:
    answer = get(settings, f"/debug/timeline?{query}", lambda *_: one_layer())
    assert answer.status_code == 400
    assert sentence in answer.json()["error"]["message"]


def test_without_workers_there_is_no_timeline(settings: RouterSettings) -> None:
    answer = get(settings, "/debug/timeline")
    assert answer.status_code == 503
    assert "no worker has a timeline yet" in answer.json()["error"]["message"]


def worked(role: Role, rank: int) -> WorkerView:
    timeline = Timeline(role, rank, capacity=64)
    timeline.mark(Activity.DISPATCH, tokens=10)
    timeline.mark(Activity.COLLECT, tokens=10, wire_bytes=400)
    timeline.mark(Activity.FFN, tokens=10)
    timeline.mark(Activity.RECEIVE, wire_bytes=1000)
    timeline.count_experts(3, 20)
    for value in (0.002, 0.3, 3.0, 6000.0):
        timeline.work.observe(value)
    return WorkerView(role, rank, "ready", counters={"calls": 4, "failures": 1}, totals=timeline.totals())


def test_metrics_say_where_the_time_goes_and_how_large_calls_are() -> None:
    views = [worked(Role.ATTENTION, 1), worked(Role.FFN, 0), WorkerView(Role.FFN, 1, "starting")]
    text = Metrics().render([], views).decode()
    samples = {
        (s.name, *sorted(s.labels.items())): s.value for f in text_string_to_metric_families(text) for s in f.samples
    }
    attention, ffn = ("attention_rank", "1"), ("ffn_rank", "0")
    assert samples["afd_dispatches_total", attention] == 1
    assert samples["afd_dispatched_tokens_total", attention] == 10
    assert samples["afd_wire_bytes_total", ("rank", "1"), ("role", "attention")] == 1400
    assert samples["afd_wire_bytes_total", ("rank", "0"), ("role", "ffn")] == 1400
    assert samples["afd_ffn_calls_total", ffn] == 1
    assert samples["afd_ffn_dispatches_total", ffn] == 1
    assert samples["afd_expert_calls_total", ffn] == 3
    assert samples["afd_expert_tokens_total", ffn] == 20
    assert samples["afd_step_seconds_bucket", attention, ("le", "0.0025")] == 1
    assert samples["afd_step_seconds_bucket", attention, ("le", "0.5")] == 2
    assert samples["afd_step_seconds_bucket", attention, ("le", "+Inf")] == 4
    assert samples["afd_step_seconds_count", attention] == 4
    assert samples["afd_ffn_call_tokens_bucket", ffn, ("le", "4.0")] == 3
    assert samples["afd_ffn_call_tokens_sum", ffn] == pytest.approx(6003.302)
    totals = views[0].totals
    assert totals is not None
    for name, total in totals.activities.items():
        key = "afd_activity_seconds_total", ("activity", name), ("rank", "1"), ("role", "attention")
        assert samples[key] == pytest.approx(total.seconds)
    assert not any("ffn_rank" in dict(key[1:]) and dict(key[1:])["ffn_rank"] == "1" for key in samples)


def test_the_status_of_an_ffn_worker_is_what_it_counted(start: Callable[..., object], settings: RouterSettings) -> None:
    router = start(settings, worked(Role.FFN, 0), WorkerView(Role.FFN, 1, "starting"))
    working, starting = router.http.get("/status").json()["workers"]  # type: ignore[attr-defined]
    assert working["status"] == {"calls": 4, "failures": 1}
    assert starting["status"] is None
    assert "totals" not in working
    assert 'afd_ffn_calls_total{ffn_rank="0"} 1.0' in router.http.get("/metrics").text  # type: ignore[attr-defined]
