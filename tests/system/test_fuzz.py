"""A storm of 20,000 malformed requests and of clients that leave: no 500, no hang, and nothing of it stays behind."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest

from afd.types import ClusterView
from router.settings import RouterSettings
from tests import tiny
from tests.system.fuzzing import Storm
from tests.system.serving import Serving, serving, until
from tests.unit.router.scripted_worker import RunningRouter, Say, ScriptedWorker

TIMES = float(os.environ.get("FUZZ_TIMES", "1"))  # more of everything, for a longer look
MOST_MIB = 48  # that a process may have grown over the storm


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "deployment.yaml").write_text("attention: {kv_cache_gib: 0.02}\n")
    model = tiny.write(folder / "tiny")
    with serving(model, str(folder / "deployment.yaml"), "--backend", "local") as running:
        yield running


def held(server: Serving) -> dict[str, dict[str, int]]:
    """What each process has: file descriptors, threads, MiB."""
    pids = {f"{w['role']} {w['rank']}": w["pid"] for w in server.status()["workers"]} | {"router": server.process.pid}
    seen = {}
    for name, pid in pids.items():
        process = psutil.Process(pid)
        mib = process.memory_info().rss >> 20
        seen[name] = {"files": process.num_fds(), "threads": process.num_threads(), "mib": mib}
    return seen


def weather(url: str, seed: int, bodies: int, heads: int, leavers: int) -> Storm:
    """The storm, once it is over."""
    counts = (int(count * TIMES) for count in (bodies, heads, leavers))
    storm = Storm(url, seed, *counts)
    asyncio.run(storm.run())
    assert not storm.wrong, "\n".join(storm.wrong[:5])
    return storm


def test_20000_malformed_requests_leave_nothing_behind(server: Serving) -> None:
    weather(server.url, 1, bodies=2_000, heads=200, leavers=50)
    until(lambda: server.blocks_used() == 0)
    before = held(server)
    started = time.monotonic()
    storm = weather(server.url, 2, bodies=20_000, heads=1_500, leavers=400)
    print(f"{time.monotonic() - started:.1f} s: {dict(storm.statuses)}, {storm.closed} closed, {storm.left} left")
    assert storm.statuses[200] > 1_000 * TIMES
    assert storm.statuses[400] > 10_000 * TIMES
    until(lambda: server.blocks_used() == 0)
    asked = time.monotonic()
    answer = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 2})
    assert answer.status_code == 200
    assert time.monotonic() - asked < 2.0

    def grown(what: str) -> int:
        now = held(server)
        return max(now[name][what] - before[name][what] for name in before)

    until(lambda: grown("files") <= 2)
    until(lambda: grown("threads") <= 2)
    print(f"before {before}\nafter  {held(server)}")
    assert grown("mib") < MOST_MIB
    assert not any("Traceback" in line for line in server.lines)


def test_no_task_is_left_of_them(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The router in this process, where its tasks can be counted, before an engine that follows a script."""
    folder = tmp_path_factory.mktemp("router")
    settings = RouterSettings(
        model_name="tiny",
        max_context=1024,
        vocab_size=260,
        tokenizer_json=tiny.write_tokenizer(folder),
        tokenizer_config={"chat_template": tiny.CHAT_TEMPLATE, "eos_token": tiny.EOS},
    )
    worker = ScriptedWorker(Say(tiny.byte_ids("Grüezi".encode() * 10)))
    router = RunningRouter(settings, ClusterView(epoch=7, model="tiny", topology="1A1F", workers=(worker.view(),)))

    def tasks() -> set[str]:
        async def names() -> list[str]:
            return [str(task.get_coro()) for task in asyncio.all_tasks() if task is not asyncio.current_task()]

        loop = router.server._loop
        assert loop is not None
        return set(asyncio.run_coroutine_threadsafe(names(), loop).result(10))

    try:
        weather(router.url, 3, bodies=200, heads=50, leavers=20)
        until(lambda: len(tasks()) < 12)
        before, threads = tasks(), threading.active_count()
        weather(router.url, 4, bodies=2_000, heads=300, leavers=150)
        until(lambda: len(tasks()) <= len(before))
        assert threading.active_count() <= threads + 6  # the pool that long work goes to
        answer = router.http.post("/v1/completions", json={"model": "tiny", "prompt": "a"})
        assert answer.status_code == 200
    finally:
        router.close()
        worker.die()
