"""The timeline of a whole server, as its user gets it: over HTTP and from `afd trace`."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests import chrome_trace, tiny
from tests.system.serving import AFD, Serving, serving, until

SECONDS = 0.25  # a tiny model's workers make up to 100,000 marks a second, and an answer holds 30,000 of each


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    model = tiny.write(tmp_path_factory.mktemp("models") / "tiny")
    with serving(model, "--backend", "local", "--topology", "2A2F", "--dtype", "fp32") as running:
        yield running


def generate(server: Serving, max_tokens: int) -> None:
    body = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=120.0).status_code == 200


@contextmanager
def load(server: Serving) -> Iterator[None]:
    """Four streams, one after the other each, until the block ends."""
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            generate(server, 100)

    clients = [threading.Thread(target=run) for _ in range(4)]
    for client in clients:
        client.start()
    try:
        yield
    finally:
        over.set()
        for client in clients:
            client.join()


def trace(server: Serving, *arguments: str) -> str:
    command = [AFD, "trace", "--url", server.url, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def activity_seconds(server: Serving) -> dict[tuple[str, str], float]:
    """By role and rank, over all activities."""
    sums: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics", timeout=30.0).text):
        for sample in family.samples if family.name == "afd_activity_seconds" else ():
            worker = (sample.labels["role"], sample.labels["rank"])
            sums[worker] = sums.get(worker, 0.0) + sample.value
    return sums


def test_the_trace_of_a_server_under_load_is_one_viewers_take_and_covers_its_window(server: Serving) -> None:
    with load(server):
        generate(server, 200)
        answer = httpx.get(f"{server.url}/debug/timeline", params={"seconds": SECONDS}, timeout=60.0)
    assert answer.status_code == 200
    document: dict[str, Any] = answer.json()
    events = chrome_trace.check(document)
    names = {event["args"]["name"].split(" (")[0] for event in events["M"] if event["name"] == "process_name"}
    assert names == {"attention_rank 0", "attention_rank 1", "ffn_rank 0", "ffn_rank 1"}
    assert events["s"], "no dispatch was followed"
    assert document["otherData"]["summary"]["missing"] == []
    window_us = 1e6 * document["otherData"]["window_s"]
    assert window_us == pytest.approx(1e6 * SECONDS, rel=0.001)
    for pid in {event["pid"] for event in events["X"]}:
        own_us = sum(event["dur"] for event in events["X"] if (event["pid"], event["tid"]) == (pid, 1))
        assert own_us == pytest.approx(window_us, rel=0.001)


def test_afd_trace_writes_what_the_server_sends_and_sums_it_up(server: Serving, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    with load(server):
        generate(server, 200)
        assert str(file) in trace(server, "--seconds", "1", "-o", str(file)).replace("\n", "")
        text = trace(server, "--summary", "--seconds", "1")
        summary = json.loads(trace(server, "--summary", "--json", "--seconds", "1"))
    chrome_trace.check(json.loads(file.read_text()))
    for words in ("pipeline efficiency", "tokens per expert call", "bytes per token", "bubbles"):
        assert words in text
    assert summary["efficiency"] == max(summary["busy"].values()) > 0
    assert summary["tokens_per_ffn_call"] >= 1
    for worker in summary["workers"]:
        assert sum(worker["activities"].values()) == pytest.approx(1.0)
        assert sum(worker["bubbles"].values()) == pytest.approx(1.0 - worker["busy"])


def test_the_metrics_of_every_worker_grow_as_the_clock_on_the_wall_does(server: Serving) -> None:
    """Steadily, though what a worker said last may be half a second old, and a wait of a second counts at its end."""
    with load(server):
        generate(server, 50)
        until(lambda: len(activity_seconds(server)) == 4)
        before, began = activity_seconds(server), time.monotonic()
        until(lambda: time.monotonic() - began > 4.0)
        after, wall_s = activity_seconds(server), time.monotonic() - began
    for worker, seconds in after.items():
        assert seconds - before[worker] == pytest.approx(wall_s, abs=1.0), worker


def test_the_status_shows_what_ffn_workers_have_done(server: Serving) -> None:
    generate(server, 20)
    until(lambda: all((server.worker("ffn", rank)["status"] or {}).get("dispatches") for rank in (0, 1)))
    status = server.worker("ffn")["status"]
    assert status["failures"] == 0
    assert status["dispatches"] >= status["calls"] > 0


def bubble_seconds(server: Serving) -> dict[str, dict[tuple[str, str], float]]:
    """By role and rank: over all causes, and of how long the causes are known."""
    sums: dict[str, dict[tuple[str, str], float]] = {"afd_bubble_seconds": {}, "afd_bubble_window_seconds": {}}
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics", timeout=30.0).text):
        for sample in family.samples if family.name in sums else ():
            worker = (sample.labels["role"], sample.labels["rank"])
            sums[family.name][worker] = sums[family.name].get(worker, 0.0) + sample.value
    return sums


def test_the_metrics_say_why_workers_waited_in_what_was_seen_of_them(server: Serving) -> None:
    with load(server):
        until(lambda: len(bubble_seconds(server)["afd_bubble_seconds"]) == 4)
        found = bubble_seconds(server)
    for worker, seen_s in found["afd_bubble_window_seconds"].items():
        assert 0.0 < found["afd_bubble_seconds"][worker] <= seen_s * 1.001
