"""FFN workers that are lost and come back change no token: in the middle of prompts and answers, on every wire."""

from __future__ import annotations

import random
import threading
from functools import cache

import pytest

from afd.types import DType, SamplingParams
from tests.rig import SECONDS, Rig, finished, split, tiny, weights_of

SPEC = tiny("step3")
WEIGHTS = weights_of(SPEC)
rng = random.Random(11)
PROMPTS = [[rng.randrange(100) for _ in range(rng.randrange(1, 60))] for _ in range(8)]
DRAWN = SamplingParams(temperature=0.8, seed=3, max_tokens=40, ignore_eos=True)


def lose_some(rig: Rig, losses: int) -> list[list[int]]:
    """All prompts' tokens, while FFN workers are killed and replaced, each under way of some token."""
    results = [rig.submit(str(i), prompt, DRAWN, i % len(rig.engines)) for i, prompt in enumerate(PROMPTS)]
    for loss in range(losses):
        wanted = 8 + 12 * loss
        while sum(len(r.tokens) for r in results) < wanted * len(results) // 2:
            assert not all(r.ended.is_set() for r in results), "all was over before the last loss"
            threading.Event().wait(0.001)
        rank = loss % len(rig.loops)
        rig.kill_ffn(rank)
        before = [len(r.tokens) for r in results]
        queued = rig.submit(f"queued {loss}", PROMPTS[0], DRAWN)
        assert not queued.ended.wait(0.05), "a request was refused while a worker is being replaced"
        assert all(engine.state == "recovering" and f"ffn_rank {rank}" in engine.problem for engine in rig.engines)
        rig.restart_ffn(rank)
        assert len(finished(queued).tokens) == DRAWN.max_tokens
        assert [len(r.tokens) for r in results] >= before
    tokens = [finished(result).token_ids for result in results]
    assert all(engine.state == "ready" for engine in rig.engines)
    rig.check_idle()
    return tokens


@cache
def undisturbed(topology: str, microbatches: int = 3, dispatch_dtype: DType | None = None) -> list[list[int]]:
    with split(SPEC, WEIGHTS, topology, microbatches=microbatches, dispatch_dtype=dispatch_dtype) as rig:
        return rig.generate(PROMPTS, DRAWN)


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_streams_pause_and_go_on_with_the_same_tokens(transport: str) -> None:
    with split(SPEC, WEIGHTS, "2A2F", transport=transport, recover_s=SECONDS) as rig:
        assert lose_some(rig, 2) == undisturbed("2A2F")


@pytest.mark.parametrize("microbatches", [1, 4])
def test_whatever_the_number_of_microbatches(microbatches: int) -> None:
    with split(SPEC, WEIGHTS, "1A2F", microbatches=microbatches, transport="shm", recover_s=SECONDS) as rig:
        assert lose_some(rig, 2) == undisturbed("1A2F", microbatches)


def test_with_dispatches_in_eight_bits() -> None:
    wire = {"dispatch_dtype": DType.FP8}
    with split(SPEC, WEIGHTS, "1A2F", transport="shm", recover_s=SECONDS, **wire) as rig:  # type: ignore[arg-type]
        assert lose_some(rig, 2) == undisturbed("1A2F", **wire)  # type: ignore[arg-type]


def test_all_ffn_workers_may_be_gone_at_once() -> None:
    with split(SPEC, WEIGHTS, "1A2F", recover_s=SECONDS) as rig:
        results = [rig.submit(str(i), prompt, DRAWN) for i, prompt in enumerate(PROMPTS)]
        assert results[0].started.wait(SECONDS)
        for rank in (0, 1):
            rig.kill_ffn(rank)
        for rank in (1, 0):
            rig.restart_ffn(rank)
        assert [finished(result).token_ids for result in results] == undisturbed("1A2F")
        rig.check_idle()
