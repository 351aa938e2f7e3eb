"""What the status page is, and what it and `afd top` are told once a second."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from scripted_worker import RunningRouter, cluster
from starlette.applications import Starlette

from afd.errors import ClusterError
from afd.pipeline.timeline import Timelines
from afd.types import ClusterView, Role, WorkerView
from router.app import create_app
from router.settings import RouterSettings
from router.telemetry import live
from tests.unit.pipeline.recordings import one_layer

Collect = Callable[[float, int], Timelines]


def get(app: Starlette, *paths: str) -> list[httpx.Response]:
    """All at the same time."""

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://router") as client:
            return await asyncio.gather(*(client.get(path) for path in paths))

    return asyncio.run(ask())


def application(settings: RouterSettings, collect: Collect, view: ClusterView | None = None) -> Starlette:
    return create_app(settings, lambda: view or cluster(), collect)


def test_the_page_lets_nothing_in_but_its_own_style_and_script(settings: RouterSettings) -> None:
    (page,) = get(application(settings, lambda *_: one_layer()), "/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["cache-control"] == "no-cache"
    assert page.headers["x-content-type-options"] == "nosniff"
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy.pop("default-src") == "'none'"
    for tag in ("style", "script"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert policy.pop("connect-src") == "'self'"
    assert policy.pop("img-src") == "data:"
    assert set(policy.values()) == {"'none'"}
    elsewhere = set(re.findall(r"[a-z]+://[^\s'\"]+", page.text)) - {"http://www.w3.org/2000/svg"}
    assert not elsewhere, "a page that works without a network"


def test_one_answer_says_what_status_counts_and_timelines_say(router: RunningRouter) -> None:
    router.openai.completions.create(model="tiny", prompt="the capital", max_tokens=3)
    answer = router.http.get("/status/pipeline")
    assert answer.headers["cache-control"] == "no-store"
    told: dict[str, Any] = answer.json()
    assert told["workers"] == router.http.get("/status").json()["workers"]
    counted = told["counted"]
    assert counted["generated_tokens"] == 3
    for name, count in (("time_to_first_token", 1), ("inter_token_latency", 2)):
        assert counted[name]["counts"][-1] == count
        assert counted[name]["bounds_s"][-1] is None
        assert len(counted[name]["bounds_s"]) == len(counted[name]["counts"])
    assert (told["timeline"], told["lanes"]) == (None, None)
    assert "no worker has a timeline yet" in told["timeline_problem"]


def test_the_look_at_the_timelines_is_small_and_everybody_shares_it(settings: RouterSettings) -> None:
    asked: list[tuple[float, int, str]] = []

    def collect(seconds: float, max_events: int) -> Timelines:
        asked.append((seconds, max_events, threading.current_thread().name))
        return one_layer()

    answers = get(application(settings, collect), *["/status/pipeline"] * 5)
    assert len({answer.content for answer in answers}) == 1
    assert [(seconds, most) for seconds, most, _ in asked] == [(live.WINDOW_S, live.MAX_EVENTS)]
    assert asked[0][2] != threading.main_thread().name, "others' tokens would wait"
    told = answers[0].json()
    assert told["timeline"]["efficiency"] == pytest.approx(0.31)
    assert [lane["role"] for lane in told["lanes"]["lanes"]] == ["attention", "ffn"]
    assert told["timeline_problem"] == ""


def test_timelines_that_fail_or_do_not_come_leave_the_rest_as_it_is(
    settings: RouterSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "LOOK_S", 0.05)
    late = threading.Event()

    def fails(_seconds: float, _max_events: int) -> Timelines:
        raise ClusterError("the controller is gone")

    def waits(_seconds: float, _max_events: int) -> Timelines:
        late.wait(10.0)
        return one_layer()

    lost = cluster(WorkerView(Role.FFN, 0, "lost", message="ffn_rank 0 is gone"))
    threading.Timer(0.5, late.set).start()
    for collect, sentence in ((fails, "the controller is gone"), (waits, "did not come within 0.05 s")):
        told = get(application(settings, collect, lost), "/status/pipeline")[0].json()
        assert sentence in told["timeline_problem"]
        assert told["problem"] == told["workers"][0]["message"] == "ffn_rank 0 is gone"
