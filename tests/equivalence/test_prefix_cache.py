"""KV taken from the prefix cache is bit for bit the KV that would have been computed, and so are the answers."""

from __future__ import annotations

import random

import pytest

from afd.native import library as native
from afd.types import SampledToken, SamplingParams
from tests.rig import finished, split, tiny, weights_of

compiled_only = pytest.mark.skipif(native.load() is None, reason="no C++ compiler, or AFD_KERNELS=plain")
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=3)


def prompts() -> list[list[int]]:
    """Conversations: each begins with one of two prefixes, and some go on from an earlier one."""
    rng = random.Random(11)
    prefixes = [[rng.randrange(100) for _ in range(length)] for length in (64, 37)]
    found: list[list[int]] = []
    for i in range(18):
        start = found[i - 6] if i % 3 == 2 and i > 6 else prefixes[i % 2]
        found.append(start + [rng.randrange(100) for _ in range(rng.randint(1, 20))])
    return [*found, found[0], found[1]]


def answers(
    family: str, *, compiled: bool, prefix_cache: bool, num_blocks: int = 512
) -> tuple[list[list[SampledToken]], int, int]:
    """Tokens with their logprobs, how many prompt tokens were computed, and how many were said to be cached."""
    spec = tiny(family)
    with split(
        spec,
        weights_of(spec),
        microbatches=2,
        compiled=compiled,
        prefix_cache=prefix_cache,
        num_blocks=num_blocks,
        block_size=16,
    ) as rig:
        results = []
        for i, prompt in enumerate(prompts()):
            results.append(rig.submit(str(i), prompt, PARAMS))
            if i % 5 == 4:
                finished(results[-1])
        tokens = [finished(result).tokens for result in results]
        rig.check_idle()
        return tokens, rig.engines[0].requests.prompt_tokens, rig.engines[0].scheduler.prefixes.hits


@compiled_only
@pytest.mark.parametrize("family", ["step3", "llama", "qwen3_moe"])
def test_answers_are_bit_for_bit_those_without_the_cache(family: str) -> None:
    shared, computed, hits = answers(family, compiled=True, prefix_cache=True)
    alone, every, none = answers(family, compiled=True, prefix_cache=False)
    assert shared == alone, "tokens or logprobs differ"
    assert none == 0
    assert computed == every - hits < 0.6 * every


@compiled_only
def test_a_cache_that_evicts_and_preempts_changes_nothing_either() -> None:
    shared, _, hits = answers("step3", compiled=True, prefix_cache=True, num_blocks=20)
    alone, *_ = answers("step3", compiled=True, prefix_cache=False)
    assert shared == alone
    assert hits > 0


def test_the_plain_kernels_give_the_same_tokens() -> None:
    shared, *_ = answers("step3", compiled=False, prefix_cache=True)
    alone, *_ = answers("step3", compiled=False, prefix_cache=False)
    assert [[t.token_id for t in tokens] for tokens in shared] == [[t.token_id for t in tokens] for tokens in alone]
