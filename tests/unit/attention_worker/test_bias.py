"""Masks and biases of single requests, and how long a request waited."""

from __future__ import annotations

import torch

from afd.types import GenerateRequest, SampledToken, SamplingParams
from attention_worker.sampler import Sampler
from attention_worker.sequence import Sequence

VOCAB = 20


def next_token(row: torch.Tensor, generated: tuple[int, ...] = (), **params: object) -> SampledToken:
    sequence = Sequence(GenerateRequest("r", (1, 2), SamplingParams(**params)), 0, 100)  # type: ignore[arg-type]
    sequence.token_ids.extend(generated)
    return Sampler((0,)).sample(row.clone().unsqueeze(0), [sequence])[0]


def rising() -> torch.Tensor:
    """The higher the id, the likelier."""
    return torch.arange(VOCAB, dtype=torch.float32)


def test_a_bias_is_added_to_the_logit_and_not_to_the_logprob_that_is_told() -> None:
    assert next_token(rising(), temperature=0.0).token_id == 19
    biased = next_token(rising(), temperature=0.0, logit_bias=((3, 100.0), (19, -100.0)), logprobs=0)
    assert biased.token_id == 3
    assert biased.logprob == float(torch.log_softmax(rising(), -1)[3])
    assert next_token(rising(), temperature=0.0, logit_bias=((18, 0.5),)).token_id == 19
    assert next_token(rising(), temperature=0.0, logit_bias=((18, 1.5),)).token_id == 18


def test_only_allowed_tokens_are_drawn() -> None:
    drawn = {next_token(rising() / 9, seed=seed, allowed_token_ids=(4, 7)).token_id for seed in range(60)}
    assert drawn == {4, 7}


def test_a_bad_word_is_never_completed_and_its_tokens_are_free_elsewhere() -> None:
    words = ((5, 19), (18,))
    assert next_token(rising(), temperature=0.0, bad_words=words).token_id == 19
    assert next_token(rising(), (5,), temperature=0.0, bad_words=words).token_id == 17
    assert next_token(rising(), (5, 6), temperature=0.0, bad_words=words).token_id == 19
    assert next_token(rising(), (), temperature=0.0, bad_words=((2, 19),)).token_id == 19, "2 is the prompt's"


def test_a_request_that_allows_nothing_still_gets_a_token_and_disturbs_nobody() -> None:
    strict = SamplingParams(allowed_token_ids=(0,), min_tokens=3, max_tokens=5, seed=1)
    both = (strict, SamplingParams(seed=2))
    sequences = [Sequence(GenerateRequest("r", (1,), params), 0, 100) for params in both]
    together = Sampler((0,)).sample(rising().repeat(2, 1), sequences)
    assert 0 <= together[0].token_id < VOCAB
    assert together[1] == Sampler((0,)).sample(rising().unsqueeze(0), sequences[1:])[0]


def test_the_first_token_says_how_long_the_request_waited_and_the_others_do_not() -> None:
    sequence = Sequence(GenerateRequest("r", (1,), SamplingParams()), 0, 100)
    sequence.arrived_s, sequence.scheduled_s = 10.0, 12.5
    assert sequence.append(SampledToken(3), ()).queue_s == 2.5
    assert sequence.append(SampledToken(4), ()).queue_s is None
