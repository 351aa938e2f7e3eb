"""An attention worker freezes, and another is killed, under 16 streams: each stream is what it would have been."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests import tiny
from tests.system.serving import Serving, serving, until

MODEL = "tiny"
STREAMS = 16
TOKENS = 500
CALL_TOKENS = 350  # of the chats with tools, whose prompts are long
BEGUN = 40  # tokens of each stream before the fault
SILENCE_S = 2.0
NOISE_S = 8.0  # what a busy machine may add to a pause

Json = dict[str, Any]
TOOL: Json = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "minLength": CALL_TOKENS}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
KINDS: list[tuple[str, Json]] = [
    ("/v1/completions", {"temperature": 0, "logprobs": 2, "ignore_eos": True}),
    ("/v1/completions", {"temperature": 1.2, "n": 2, "ignore_eos": True, "top_p": 0.95}),
    ("/v1/completions", {"temperature": 0.7, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "ignore_eos": True}),
    ("/v1/completions", {"guided_regex": "([a-f]{2}[0-9]|日本){200}", "priority": -1}),
    ("/v1/completions", {"min_tokens": 400, "stop": ["a", "b", "c"], "ignore_eos": True, "cache_salt": "x"}),
    ("/v1/chat/completions", {"ignore_eos": True, "logprobs": True, "top_logprobs": 1, "user": "me"}),
    ("/v1/chat/completions", {"tools": [TOOL], "tool_choice": "required", "max_tokens": CALL_TOKENS}),
    (
        "/v1/chat/completions",
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
            "type": "array", "items": {"enum": ["yes", "no", 1.5]}, "minItems": 150, "maxItems": 160,
        }}}},
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("models")
    deployment = folder / "deployment.yaml"
    deployment.write_text(json.dumps({"router": {"silence_s": SILENCE_S}}))
    model = tiny.write(folder / MODEL)
    with serving(model, str(deployment), "--backend", "local", "--topology", "2A1F") as running:
        yield running


def body(number: int) -> tuple[str, Json]:
    path, fields = KINDS[number % len(KINDS)]
    asked = f"Number {number}"
    prompt = {"messages": [{"role": "user", "content": asked}]} if "chat" in path else {"prompt": asked}
    common = {"model": MODEL, "stream": True, "return_token_ids": True, "stream_options": {"include_usage": True}}
    return path, {**common, "temperature": 1.0, "seed": number, "max_tokens": TOKENS, **prompt, **fields}


class Watched:
    """One stream while it is read: `begun` is set after BEGUN tokens, `pause_s` the longest wait between two events."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.pause_s = 0.0
        self.num_tokens = 0

    def read(self, url: str, number: int) -> Json:
        """Its events by choice, without what is random or depends on who came before."""
        path, asked = body(number)
        choices: dict[object, list[Json]] = defaultdict(list)
        last_s, done = time.monotonic(), False
        with httpx.stream("POST", url + path, json=asked, timeout=60.0, trust_env=False) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                done = line == "data: [DONE]"
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, event
                    now_s = time.monotonic()
                    self.pause_s, last_s = max(self.pause_s, now_s - last_s), now_s
                    self._take(event, choices)
                elif done:
                    break
        assert done, "the stream broke off"
        return {str(index): events for index, events in choices.items()}

    def _take(self, event: Json, choices: dict[object, list[Json]]) -> None:
        for choice in event["choices"]:
            self.num_tokens += len(choice.get("token_ids") or ())
            for call in choice.get("delta", {}).get("tool_calls") or ():
                call.pop("id", None)
            choices[choice["index"]].append(choice)
        if event.get("usage"):
            choices["usage"].append({name: event["usage"][name] for name in ("prompt_tokens", "completion_tokens")})
        if self.num_tokens >= BEGUN:
            self.begun.set()


def all_streams(server: Serving, fault: Callable[[], None] = lambda: None) -> tuple[list[Json], list[Watched]]:
    """What each stream said. `fault` happens once every one has begun."""
    watched = [Watched() for _ in range(STREAMS)]
    with ThreadPoolExecutor(STREAMS) as pool:
        reading = [pool.submit(stream.read, server.url, number) for number, stream in enumerate(watched)]
        for stream, said in zip(watched, reading, strict=True):
            while not stream.begun.wait(0.1):
                assert not said.done(), said.exception() or "it ended before it began"
        fault()
        return [said.result(timeout=90) for said in reading], watched


def replays(server: Serving) -> float:
    lines = httpx.get(f"{server.url}/metrics", timeout=10.0).text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith("afd_replays_total"))


def pid(server: Serving, attention_rank: int) -> int:
    return int(server.worker("attention", attention_rank)["pid"])


def test_streams_outlive_a_frozen_worker_and_a_killed_one(server: Serving) -> None:
    undisturbed, _ = all_streams(server)
    frozen, killed = pid(server, 0), pid(server, 1)

    said, watched = all_streams(server, lambda: os.kill(frozen, signal.SIGSTOP))
    assert said == undisturbed
    first = replays(server)
    assert first >= 1
    print(f"frozen: {first:g} replays, longest pause {max(stream.pause_s for stream in watched):.2f} s")
    assert max(stream.pause_s for stream in watched) < SILENCE_S + NOISE_S

    os.kill(frozen, signal.SIGCONT)
    until(lambda: server.worker("attention", 0)["status"] is not None)
    until(lambda: server.blocks_used() == 0)

    said, watched = all_streams(server, lambda: os.kill(killed, signal.SIGKILL))
    assert said == undisturbed
    assert replays(server) > first
    print(f"killed: {replays(server) - first:g} replays, pause {max(stream.pause_s for stream in watched):.2f} s")
    assert max(stream.pause_s for stream in watched) < NOISE_S
    until(lambda: server.worker("attention", 0)["status"]["blocks_used"] == 0)
