"""What a grammar costs: compiling it, a token's mask, and a step's sampling with and without.

    PYTHONPATH=. python tests/bench/bench_grammar.py [--model smollm2] [--rows 16] [--tokens 200]

Answers are random walks through the grammar, so every kind of place in it is met; times are microseconds, mean and
99th percentile over all tokens. Sampling is greedy, of random logits; the difference between its two rows, by the
number of rows, is what a constrained request adds to a step. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import queue
import time
from collections.abc import Callable

import numpy as np
import torch

from afd import build
from afd.config import Deployment
from afd.types import GenerateRequest, SampledToken, SamplingParams
from attention_worker.grammar import Grammars, Matcher
from attention_worker.sampler import Sampler
from attention_worker.sequence import Sequence
from router.openai.structured import compose

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 5},
        "address": {
            "type": "object",
            "properties": {
                "street": {"type": "string", "maxLength": 40},
                "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
            },
            "required": ["street", "zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}
GRAMMARS = {
    "json_schema": compose("start: @answer", {"answer": {"json_schema": PERSON}}),
    "json_object": compose("start: @answer", {"answer": {"json_schema": {"type": "object"}}}),
    "regex": compose("start: @answer", {"answer": {"lark_grammar": "start: /([A-Z][a-z]{2,8} ){3,40}[0-9]{4}/"}}),
    "free text": compose("start: @answer", {"answer": {"lark_grammar": "start: /(?s:.){10000,}/"}}),
}


def timed_us(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e6


def compiled(grammars: Grammars, grammar: str) -> Matcher:
    outcomes: queue.Queue[Matcher | str] = queue.Queue()
    grammars.compile(grammar, outcomes.put)
    outcome = outcomes.get(timeout=60)
    assert isinstance(outcome, Matcher), outcome
    return outcome


def walk(matcher: Matcher, tokens: int, rng: np.random.Generator) -> list[float]:
    """Times of the masks, and of taking the tokens, along one answer."""
    times = []
    for _ in range(tokens):
        started = time.perf_counter()
        allowed = matcher.allowed()
        middle = time.perf_counter()
        token = int(rng.choice(allowed.nonzero()[0]))
        again = time.perf_counter()
        done = matcher.take(token)
        times.append((time.perf_counter() - again + middle - started) * 1e6)
        if done:
            break
    return times


def sampling_us(rows: int, vocab: int, eos: tuple[int, ...], matcher: Matcher | None, steps: int) -> float:
    """Mean time of a step's sampling of `rows` rows, each with a copy of `matcher`."""
    sequences = [Sequence(GenerateRequest(str(i), (1,), SamplingParams(temperature=0)), 0, 10_000) for i in range(rows)]
    for sequence in sequences:
        sequence.matcher = matcher.copy() if matcher else None
    sampler, total = Sampler(eos), 0.0
    for step in range(steps):
        logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(step))
        sampled: list[SampledToken] = []
        total += timed_us(lambda logits=logits, sampled=sampled: sampled.extend(sampler.sample(logits, sequences)))
        total += timed_us(lambda sampled=sampled: [s.append(t, eos) for s, t in zip(sequences, sampled, strict=True)])
    return total / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    plan = build.plan(Deployment(model=args.model))
    eos, vocab = plan.spec.eos_token_ids, plan.spec.vocab
    grammars = Grammars(plan.files.tokenizer_json, vocab, eos)
    result: dict[str, object] = {"first_s": timed_us(lambda: compiled(grammars, "start: /a/")) / 1e6}
    print(f"first grammar, with the tokenizer: {result['first_s']:.2f} s")
    for name, grammar in GRAMMARS.items():
        compile_us = timed_us(lambda grammar=grammar: compiled(grammars, grammar))
        rng, times = np.random.default_rng(0), list[float]()
        while len(times) < args.tokens * 5:
            times += walk(compiled(grammars, grammar), args.tokens, rng)
        mean, late = float(np.mean(times)), float(np.percentile(times, 99))
        result[name] = {"compile_us": compile_us, "token_us": mean, "token_p99_us": late}
        print(f"{name:12} compile {compile_us:7.0f} us   a token {mean:5.0f} us, p99 {late:5.0f} us")
    for name, matcher in (("without", None), ("with", compiled(grammars, GRAMMARS["free text"]))):
        result[f"sampling_{name}_us"] = sampling_us(args.rows, vocab, eos, matcher, 50)
        print(f"sampling {args.rows} rows {name} a grammar: {result[f'sampling_{name}_us']:.0f} us a step")
    grammars.close()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
