"""32 requests that share 512 tokens and arrive at once: what prefix cache and prefix routing save, on two workers."""

from __future__ import annotations

import json
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier

import httpx
import pytest

from tests.system.serving import Serving, serving

pytestmark = pytest.mark.smollm2

REQUESTS = 32
WITHOUT = 16  # as many without the cache take long enough: all of them would wait about twice as long
PREFIX = 512
TAIL = 24
TOKENS = 4
VOCAB = 49_000


@dataclass
class Run:
    """`computed`: prompt tokens by attention_rank; `ttft_s` and `token_ids` by request."""

    computed: list[int]
    ttft_s: list[float]
    token_ids: list[list[int]]
    cached: list[int]

    @property
    def median_ttft_s(self) -> float:
        return statistics.median(self.ttft_s)


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(4)
    prefix = [rng.randrange(VOCAB) for _ in range(PREFIX)]
    return [prefix + [rng.randrange(VOCAB) for _ in range(TAIL)] for _ in range(count)]


def ask(server: Serving, prompt: list[int], together: Barrier) -> tuple[float, list[int], int]:
    """Seconds to the first token, the token ids, and how many prompt tokens were cached."""
    body = {
        "model": "smollm2",
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    with httpx.Client(timeout=180.0) as client:
        client.get(f"{server.url}/health")  # the connection is there before the clock runs
        together.wait(60.0)
        sent, first_s, ids, cached = time.monotonic(), 0.0, list[int](), -1
        with client.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if chunk["usage"]:
                    cached = chunk["usage"]["prompt_tokens_details"]["cached_tokens"]
                for choice in chunk["choices"]:
                    ids += choice.get("token_ids") or []
                    first_s = first_s or (time.monotonic() - sent if ids else 0.0)
    return first_s, ids, cached


def computed(server: Serving) -> list[int]:
    return [server.worker("attention", rank)["status"]["prompt_tokens"] for rank in range(2)]


def run(folder: Path, policy: str, requests: int = REQUESTS, *, prefix_cache: bool) -> Run:
    file = folder / "deployment.yaml"
    file.write_text(f"router:\n  policy: {policy}\nattention:\n  prefix_cache: {str(prefix_cache).lower()}\n")
    arguments = (str(file), "--backend", "local", "--topology", "2A1F", "--dtype", "fp32")
    with serving("smollm2", *arguments) as server:
        before = computed(server)
        together = Barrier(requests)
        with ThreadPoolExecutor(requests) as pool:
            answers = list(pool.map(lambda prompt: ask(server, prompt, together), prompts(requests)))
        tokens = [after - b for after, b in zip(computed(server), before, strict=True)]
    ttft_s, token_ids, cached = zip(*answers, strict=True)
    return Run(tokens, list(ttft_s), list(token_ids), list(cached))


def test_a_shared_prefix_is_computed_once_and_on_one_worker(tmp_path: Path) -> None:
    shared = run(tmp_path, "prefix", prefix_cache=True)
    spread = run(tmp_path, "round_robin", prefix_cache=True)
    without = run(tmp_path, "round_robin", WITHOUT, prefix_cache=False)
    for name, one in (("prefix", shared), ("round_robin", spread), ("no cache", without)):
        print(f"{name}: prompt tokens computed {one.computed}, TTFT p50 {1e3 * one.median_ttft_s:.0f} ms")
    assert sum(without.computed) == WITHOUT * (PREFIX + TAIL)
    assert sum(shared.computed) <= 0.15 * REQUESTS * (PREFIX + TAIL)
    assert shared.median_ttft_s <= 0.5 * without.median_ttft_s
    assert sorted(shared.computed) == [0, PREFIX + REQUESTS * TAIL], "the prefix once, on one worker"
    assert spread.computed == [PREFIX + REQUESTS // 2 * TAIL] * 2, "the prefix once on each"
    assert sorted(shared.cached) == [0] + [PREFIX] * (REQUESTS - 1)
    assert set(without.cached) == {0}
    assert shared.token_ids == spread.token_ids
    assert shared.token_ids[:WITHOUT] == without.token_ids
    assert all(len(ids) == TOKENS for ids in shared.token_ids)
