"""Logprobs of the prompt's tokens are the whole model's, however the prompt is cut into chunks and what is cached."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from afd.types import SamplingParams
from tests.rig import Result, finished, split, tiny, weights_of, whole

PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=3, prompt_logprobs=True)


def prompts() -> list[list[int]]:
    """Of one token up to several chunks; each is there twice, and half of them begin alike."""
    rng = random.Random(5)
    shared = [rng.randrange(100) for _ in range(40)]
    some = [[rng.randrange(100) for _ in range(length)] for length in (1, 2, 7, 32, 33, 100)]
    return [*some, *(shared + prompt for prompt in some)] * 2


def check(prompt: list[int], result: Result, logits: torch.Tensor) -> None:
    raw = torch.log_softmax(logits, dim=-1)
    assert [token.token_id for token in result.prompt] == prompt
    assert (result.prompt[0].logprob, result.prompt[0].top_logprobs) == (None, ())
    for row, token in zip(raw, result.prompt[1:], strict=False):
        assert token.logprob == pytest.approx(float(row[token.token_id]), abs=2e-4)
        best = row.topk(3).values.tolist()
        assert [value for _, value in token.top_logprobs] == pytest.approx(best, abs=2e-4)


@pytest.mark.parametrize(
    ("family", "topology", "num_blocks"), [("step3", "1A2F", 256), ("llama", "1A1F", 256), ("qwen3_moe", "1A1F", 60)]
)
def test_they_are_the_whole_models(family: str, topology: str, num_blocks: int) -> None:
    spec = tiny(family)
    weights = weights_of(spec)
    oracle = whole(spec, weights)
    with split(spec, weights, topology, num_blocks=num_blocks) as rig:
        plain = rig.submit("warm", prompts()[-1], replace(PARAMS, prompt_logprobs=False))
        assert finished(plain).prompt == ()
        results = [(prompt, rig.submit(str(i), prompt, PARAMS)) for i, prompt in enumerate(prompts())]
        for prompt, result in results:
            check(prompt, finished(result), oracle.forward(prompt))
            assert result.cached_tokens == 0
            assert len(result.tokens) == 8
        again = finished(rig.submit("again", prompts()[-1], replace(PARAMS, prompt_logprobs=False)))
        assert again.cached_tokens > 0
        assert again.token_ids == plain.token_ids
        rig.check_idle()
        assert num_blocks > 60 or rig.engines[0].scheduler.preemptions > 0, "nothing was computed twice"
