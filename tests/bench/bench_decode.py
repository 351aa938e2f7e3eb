"""Decode throughput of 1A1F over the real HTTP path, beside the same model whole in one process with all cores.

    PYTHONPATH=. python tests/bench/bench_decode.py [--model NAME] [--streams 1 8 32 64] [--microbatches 1 2 3]

Each stream has a prompt of random token ids (--prompt, 128) and decodes greedily. The decode rate is taken while all
streams decode: tokens that arrived between the last stream's first token and the first stream's last one. All
candidates are started first and measured in turn, round after round; the table gives medians. The limit is what this
machine's measured GEMM rate and copy bandwidth, both cores, would allow for the model's FLOPs and bytes. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import signal
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any

import httpx
import torch

from afd import build
from afd.config import Deployment
from afd.layers.attention.registry import kernel
from afd.models.halves import no_grad
from afd.spec import ModelSpec
from afd.topology import FfnShard
from afd.types import DType, GenerateOutput, GenerateRequest, Role, SamplingParams
from attention_worker.block_manager import BlockManager
from attention_worker.kv_cache import KvCache
from attention_worker.microbatch import Microbatch
from attention_worker.requests import Requests
from attention_worker.sampler import Sampler
from attention_worker.scheduler import Scheduler
from tests.system.serving import serving

VOCAB_FROM, VOCAB_TO = 100, 40000


def prompts(count: int, length: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(VOCAB_FROM, VOCAB_TO) for _ in range(length)] for _ in range(count)]


def steady_rate(arrivals: list[list[float]]) -> float:
    """Tokens per second while every stream decodes; `arrivals` are each stream's token times in seconds."""
    begin, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    count = sum(begin < at <= end for times in arrivals for at in times)
    assert count >= len(arrivals), "the streams hardly overlapped: ask for more --tokens"
    return count / (end - begin)


# ---- candidates: something that generates `tokens` tokens for each prompt, and says when each of them came ----------


class Http:
    """`afd serve`, asked by concurrent streams."""

    def __init__(self, url: str, model: str) -> None:
        self.url = url
        self.model = model

    def run(self, requests: list[list[int]], tokens: int) -> list[list[float]]:
        return asyncio.run(self._run(requests, tokens))

    async def _run(self, requests: list[list[int]], tokens: int) -> list[list[float]]:
        limits = httpx.Limits(max_connections=len(requests))
        async with httpx.AsyncClient(base_url=self.url, timeout=600.0, limits=limits) as client:
            return list(await asyncio.gather(*(self._stream(client, prompt, tokens) for prompt in requests)))

    async def _stream(self, client: httpx.AsyncClient, prompt: list[int], tokens: int) -> list[float]:
        body = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
        body |= {"ignore_eos": True, "return_token_ids": True}
        arrivals, tail = [], b""
        async with client.stream("POST", "/v1/completions", json=body) as response:
            async for chunk in response.aiter_raw():
                arrivals += [time.perf_counter()] * chunk.count(b'"token_ids":[')
                tail = (tail + chunk)[-64:]
        assert response.status_code == 200, (response.status_code, tail)
        assert tail.rstrip().endswith(b"[DONE]"), tail
        return arrivals


class Whole:
    """Both halves in one process of its own, all cores, no wire: the engine's own step with the FFN half called."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def run(self, requests: list[list[int]], tokens: int) -> list[list[float]]:
        self._pipe.send((requests, tokens))
        return list(self._pipe.recv())


@contextmanager
def whole(model: str) -> Iterator[tuple[Whole, dict[str, Any]]]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve_whole, args=(theirs, model), daemon=True)
    process.start()
    theirs.close()  # so that a child that dies is an EOFError here
    facts = ours.recv()
    try:
        yield Whole(ours), facts
    finally:
        ours.close()
        process.join(30)


def _serve_whole(pipe: Connection, model: str) -> None:
    plan = build.plan(Deployment(model=model))
    one = FfnShard(0, 1, 1)
    attention = plan.family.attention(plan.spec, plan.weights(Role.ATTENTION))
    ffn = plan.family.ffn(plan.spec, plan.weights(Role.FFN, one), one)
    facts = {"dtype": plan.dtype.name.lower(), "threads": torch.get_num_threads()}
    pipe.send(facts | measure_machine(plan.torch_dtype))
    while True:
        try:
            requests, tokens = pipe.recv()
        except EOFError:
            return
        scheduler = Scheduler(
            BlockManager(len(requests) * 20 + 1, 16), microbatches=1, max_batch_tokens=512, max_running=len(requests)
        )
        cache = KvCache(plan.spec, scheduler.blocks.num_blocks, 16, plan.torch_dtype, plan.device, kernel("batched"))
        arrivals: list[list[float]] = [[] for _ in requests]

        def publish(outputs: list[tuple[int, GenerateOutput]], arrivals: list[list[float]] = arrivals) -> None:
            for _, output in outputs:
                arrivals[int(output.request_id)].append(time.perf_counter())

        book = Requests(scheduler, publish, vocab=plan.spec.vocab, eos_token_ids=(), max_context=320, max_waiting=10**6)
        microbatch = Microbatch(0, attention, cache, scheduler, Sampler(()), book.complete)
        for i, prompt in enumerate(requests):
            book.add(0, GenerateRequest(str(i), tuple(prompt), SamplingParams(temperature=0, max_tokens=tokens)))
        with no_grad():
            steps = microbatch.run()
            dispatch = next(steps)
            while dispatch is not None:
                dispatch = steps.send(ffn.layer(dispatch.layer, dispatch.y, dispatch.routing))
                book.flush()
        book.flush()
        pipe.send(arrivals)


# ---- the limit -----------------------------------------------------------------------------------------------------


def measure_machine(dtype: torch.dtype) -> dict[str, float]:
    """GEMM rate in FLOP/s and copy bandwidth in bytes/s (read + write), both cores."""
    a, b = torch.randn(512, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    big = torch.zeros(64 << 20, dtype=torch.uint8)
    target = torch.empty_like(big)
    gemm = min(_timed(lambda: a @ b) for _ in range(20))
    copy = min(_timed(lambda: target.copy_(big)) for _ in range(5))
    return {"gemm_flops": 2 * 512 * 1024 * 1024 / gemm, "copy_bytes": 2 * big.numel() / copy}


def _timed(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def limit(spec: ModelSpec, dtype: DType, streams: int, context: int, facts: dict[str, Any]) -> float:
    """Tokens per second if each step took the longer of its FLOPs at the GEMM rate and its bytes at the bandwidth."""
    flops = spec.half_flops_per_token(Role.ATTENTION, context) + spec.half_flops_per_token(Role.FFN, context)
    weights = spec.weight_bytes(Role.ATTENTION, dtype) + spec.weight_bytes(Role.FFN, dtype)
    if spec.moe:
        one = 3 * spec.hidden * spec.moe.intermediate * dtype.itemsize * len(spec.moe_layers)
        weights -= max(0, spec.moe.experts - streams * spec.moe.top_k) * one
    kv = streams * context * spec.kv_bytes_per_token(dtype)
    return streams / max(flops * streams / facts["gemm_flops"], (weights + kv) / facts["copy_bytes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-step3")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--microbatches", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are ended

    rates: dict[tuple[str, int], list[float]] = defaultdict(list)
    with ExitStack() as stack:
        one, facts = stack.enter_context(whole(options.model))
        candidates: dict[str, Http | Whole] = {"whole": one}
        for count in options.microbatches:
            arguments = ("--backend", "local", "--microbatches", str(count), "--transport", options.transport)
            server = stack.enter_context(serving(options.model, *arguments))
            candidates[f"1A1F, {count} microbatch{'es' * (count > 1)}"] = Http(server.url, options.model)
        for _ in range(options.rounds):
            for streams in options.streams:
                requests = prompts(streams, options.prompt)
                for name, candidate in candidates.items():
                    rates[name, streams].append(steady_rate(candidate.run(requests, options.tokens)))
                    print(f"  {name}, {streams} streams: {rates[name, streams][-1]:.0f} tokens/s", file=sys.stderr)

    plan = build.plan(Deployment(model=options.model))
    limits = {n: limit(plan.spec, plan.dtype, n, options.prompt + options.tokens // 2, facts) for n in options.streams}
    medians = {name: {n: statistics.median(rates[name, n]) for n in options.streams} for name in candidates}
    print(
        f"{options.model}, {facts['dtype']}, decode tokens/s after {options.prompt}-token prompts (share of the limit)"
    )
    print("| | " + " | ".join(f"{n} streams" for n in options.streams) + " |")
    print("|---|" + "---|" * len(options.streams))
    for name, row in medians.items():
        print(f"| {name} | " + " | ".join(f"{row[n]:.0f} ({row[n] / limits[n]:.0%})" for n in options.streams) + " |")
    print("| limit | " + " | ".join(f"{limits[n]:.0f}" for n in options.streams) + " |")
    print(json.dumps({"model": options.model, **facts, "tokens_per_s": medians, "limit": limits, "all": [
        {"candidate": name, "streams": n, "rates": [round(r, 1) for r in runs]} for (name, n), runs in rates.items()
    ]}))  # fmt: skip


if __name__ == "__main__":
    main()
