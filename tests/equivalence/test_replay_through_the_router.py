"""Connections to the attention workers break all the time: every answer is the one that undisturbed workers give."""

from __future__ import annotations

import itertools
import json
import queue
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from afd.cluster import local
from afd.cluster.controller import Controller
from afd.config import Deployment
from afd.credentials import Credentials
from router.app import RouterSettings, Server, bind
from router.relay import pool
from router.relay.pool import Pool
from router.telemetry.counts import Count
from tests import tiny

MODEL = "tiny"
CREDENTIALS = Credentials("shown-by-this-test-alone")
CUT_EVERY = 120  # tokens, over all requests
SECONDS = 60.0

Json = dict[str, Any]


class Running:
    """A cluster in threads of this process, with its real services, and a router."""

    def __init__(self, cluster: Controller, server: Server, url: str) -> None:
        self.cluster, self.server, self.url = cluster, server, url

    @property
    def pool(self) -> Pool:
        pool: Pool = self.server._app.state.gateway.pool
        return pool

    @property
    def generated_tokens(self) -> Count:
        count: Count = self.server._app.state.gateway._metrics.generation_tokens
        return count

    def in_loop(self, work: Callable[[], None]) -> None:
        assert self.server._loop is not None
        self.server._loop.call_soon_threadsafe(work)

    def count(self, metric: str) -> float:
        lines = httpx.get(f"{self.url}/metrics", timeout=10.0).text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"{metric} "))

    def blocks_used(self) -> int:
        workers = httpx.get(f"{self.url}/status", timeout=10.0).json()["workers"]
        return sum(w["status"]["blocks_used"] for w in workers if w["role"] == "attention" and w["status"])


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    model = tiny.write(tmp_path_factory.mktemp("models") / MODEL)
    deployment = Deployment(model=str(model), topology="3A1F", dtype="fp32").with_flags({"transport.kind": "inproc"})
    with local.cluster(deployment, credentials=CREDENTIALS) as cluster:
        assert cluster.wait_ready(SECONDS)
        settings = RouterSettings(
            MODEL,
            max_context=1024,
            vocab_size=260,
            tokenizer_json=model / "tokenizer.json",
            tokenizer_config=json.loads((model / "tokenizer_config.json").read_text()),
            policy="round_robin",
            poll_s=0.02,
            credentials=CREDENTIALS,
        )
        ready: queue.Queue[str] = queue.Queue()
        server = Server(settings, cluster.view, bind("127.0.0.1", 0), on_ready=ready.put)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        yield Running(cluster, server, ready.get(timeout=SECONDS))
        server.stop()
        thread.join(SECONDS)
        assert not thread.is_alive()


@contextmanager
def cutting(running: Running) -> Iterator[None]:
    """Now and then the next worker loses the router's connection, and gets a new one soon."""
    over, turns, tokens = threading.Event(), itertools.count(), running.generated_tokens
    next_cut = tokens.value + CUT_EVERY

    def cut() -> None:
        nonlocal next_cut
        if tokens.value < next_cut:
            return
        next_cut = tokens.value + CUT_EVERY
        members = [member for member in running.pool.members if member.client is not None and member.usable]
        if len(members) > 1 and (client := members[next(turns) % len(members)].client) is not None:
            client.fail("cut by the test")

    def go_on() -> None:
        while not over.wait(0.005):
            running.in_loop(cut)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {
        "city": {"type": "string", "maxLength": 40}}, "required": ["city"], "additionalProperties": False}}}
    for name in ("weather", "time")
]  # fmt: skip
SCHEMA = {"type": "array", "items": {"enum": ["yes", "no", None, 1.5]}, "minItems": 20, "maxItems": 40}
KINDS: list[tuple[str, Json]] = [
    ("completions", {"temperature": 0, "logprobs": 2, "ignore_eos": True}),
    ("completions", {"n": 3, "logprobs": 0, "top_p": 0.9, "top_k": 50, "min_p": 0.01}),
    ("completions", {"n": 1, "best_of": 3, "ignore_eos": True}),
    ("completions", {"temperature": 0.5, "repetition_penalty": 1.4, "frequency_penalty": 0.7, "presence_penalty": 0.1}),
    ("completions", {"guided_regex": "([a-f]{2}[0-9]|日本){20,30}", "priority": -1, "echo": True}),
    ("completions", {"stop": ["ab", "Z", "\n"], "min_tokens": 40, "include_stop_str_in_output": True}),
    ("completions", {"bad_words": ["a", "qu"], "logit_bias": {"70": 5, "71": 3}, "stop_token_ids": [99, 101]}),
    ("chat/completions", {"logprobs": True, "top_logprobs": 2, "n": 2, "user": "me", "timeout": SECONDS}),
    ("chat/completions", {"tools": TOOLS, "tool_choice": "required"}),
    ("chat/completions", {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}),
]


def requests() -> list[tuple[str, Json]]:
    """Of every kind one that is streamed, unless it cannot be, and one that is not."""
    made = []
    for number, (path, fields) in enumerate(KINDS * 2):
        asked = " ".join(f"{random.Random(number).random()}" for _ in range(number % 7 + 1))
        prompt = {"messages": [{"role": "user", "content": asked}]} if "chat" in path else {"prompt": asked}
        body = {"model": MODEL, "seed": number, "max_tokens": 100, "return_token_ids": True, **prompt, **fields}
        if number < len(KINDS) and "best_of" not in fields:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        made.append((path, body))
    return made


def said(document: Json) -> Json:
    """Without what is random, and without how much was cached."""
    assert "error" not in document, document
    for name in ("id", "created"):
        document.pop(name, None)
    for choice in document["choices"]:
        for call in (choice.get("delta") or choice.get("message") or {}).get("tool_calls") or ():
            call.pop("id", None)
    if document.get("usage"):
        document["usage"].pop("prompt_tokens_details")
    return document


def ask(url: str, path: str, body: Json) -> list[Json]:
    """The answer, or its events by choice: those of several choices interleave as they will."""
    answer = httpx.post(f"{url}/v1/{path}", json=body, timeout=SECONDS, trust_env=False)
    assert answer.status_code == 200, answer.text
    if not body.get("stream"):
        return [said(answer.json())]
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]", lines[-1]
    events = [said(json.loads(line)) for line in lines[:-1]]
    return sorted(events, key=lambda event: event["choices"][0]["index"] if event["choices"] else -1)


def test_answers_do_not_show_that_connections_break(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_RECONNECT_S", 0.05)
    asked = requests()

    def ask_all() -> list[list[Json]]:
        with ThreadPoolExecutor(15) as threads:
            return list(threads.map(lambda one: ask(running.url, *one), asked))

    undisturbed, before = ask_all(), running.count("afd_generation_tokens_total")
    began_s = time.monotonic()
    with cutting(running):
        disturbed = ask_all()
    print(f"{running.count('afd_replays_total'):g} replays in {time.monotonic() - began_s:.1f} s")
    for (path, body), one, other in zip(asked, undisturbed, disturbed, strict=True):
        assert other == one, (path, body)
    assert running.count("afd_generation_tokens_total") == 2 * before, "each token is counted once"
    assert running.count("afd_replays_total") > len(asked)
    assert len(running.pool.stranded) == 0
    deadline = time.monotonic() + 20
    while running.blocks_used():
        assert time.monotonic() < deadline, "blocks were left behind"
        time.sleep(0.02)


ANOTHER_ROUTER = """
import asyncio, sys
from afd.credentials import Credentials
from afd.rpc.attention_client import AttentionClient, Inbox
from afd.types import GenerateRequest, SamplingParams

async def main():
    inbox = Inbox()
    credentials, addresses = Credentials(sys.argv[1]), sys.argv[2:]
    for address in addresses:
        client = await AttentionClient.connect(address, peer=address, deadline_s=20, credentials=credentials)
        for i in range(4):
            sampling = SamplingParams(max_tokens=1000, ignore_eos=True)
            client.submit(GenerateRequest(f"{address} {i}", (1, 2, i), sampling), inbox)
    begun = set()
    while True:
        begun |= {output.request_id for output in await inbox.take() if output.tokens}
        if len(begun) == 4 * len(addresses):
            print("begun", flush=True)

asyncio.run(main())
"""


def test_a_router_that_dies_takes_only_its_own_requests_along(running: Running) -> None:
    body = {"model": MODEL, "prompt": "x", "seed": 1, "max_tokens": 600, "ignore_eos": True, "return_token_ids": True}
    undisturbed = ask(running.url, "completions", body)
    addresses = [worker.address for worker in running.cluster.view().workers if worker.address]
    command = [sys.executable, "-c", ANOTHER_ROUTER, CREDENTIALS.token, *addresses]
    with ThreadPoolExecutor(1) as threads, subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "begun\n"
        ours = threads.submit(ask, running.url, "completions", body)
        other.kill()
        assert ours.result(timeout=SECONDS) == undisturbed
    deadline = time.monotonic() + 20
    while running.blocks_used():
        assert time.monotonic() < deadline, "the dead router's requests were not cancelled"
        time.sleep(0.02)
