"""Sampling against the definitions, written out plainly."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from afd.types import GenerateRequest, SamplingParams
from attention_worker.sampler import Sampler, uniform
from attention_worker.sequence import Sequence

VOCAB = 50


def sequence(params: SamplingParams, prompt: tuple[int, ...] = (1, 2, 3), generated: tuple[int, ...] = ()) -> Sequence:
    s = Sequence(GenerateRequest("r", prompt, params), 0, 1000)
    s.token_ids.extend(generated)
    return s


def logits(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def draw_many(row: torch.Tensor, count: int = 3000, **params: object) -> Counter[int]:
    """Samples one row under `count` seeds."""
    sampler = Sampler(())
    sequences = [sequence(SamplingParams(seed=seed, **params)) for seed in range(count)]  # type: ignore[arg-type]
    return Counter(t.token_id for t in sampler.sample(row.expand(count, -1).clone(), sequences))


def test_greedy_takes_the_best_of_each_row() -> None:
    rows = logits(0, 5)
    tokens = Sampler(()).sample(rows.clone(), [sequence(SamplingParams(temperature=0))] * 5)
    assert [t.token_id for t in tokens] == rows.argmax(-1).tolist()
    assert all(t.logprob is None for t in tokens)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_frequencies_follow_the_softmax_at_the_temperature(temperature: float) -> None:
    row = logits(1)[0]
    counts = draw_many(row, temperature=temperature)
    probs = torch.softmax(row / temperature, -1)
    chi_square = sum((counts[i] - 3000 * p) ** 2 / (3000 * p) for i, p in enumerate(probs.tolist()))
    assert chi_square < VOCAB + 5 * math.sqrt(2 * VOCAB)


def test_top_k_top_p_and_min_p_keep_exactly_the_tokens_of_their_definitions() -> None:
    row = logits(2)[0]
    probs, order = torch.softmax(row, -1).sort(descending=True)
    nucleus = int((probs.cumsum(-1) < 0.7).sum()) + 1
    likely = int((probs >= 0.2 * probs[0]).sum())
    assert set(draw_many(row, top_k=5)) == set(order[:5].tolist())
    assert set(draw_many(row, top_p=0.7)) == set(order[:nucleus].tolist())
    assert set(draw_many(row, min_p=0.2)) == set(order[:likely].tolist())
    assert set(draw_many(row, top_k=1)) == {int(order[0])}
    assert set(draw_many(row, top_p=1e-9)) == {int(order[0])}


def test_a_token_depends_on_its_own_request_alone() -> None:
    rows = logits(3, 4)
    params = [
        SamplingParams(seed=5, temperature=0.9),
        SamplingParams(temperature=0),
        SamplingParams(seed=6, top_k=3, repetition_penalty=1.3),
        SamplingParams(seed=7, top_p=0.5, frequency_penalty=1.0),
    ]
    sampler = Sampler((0,))
    together = sampler.sample(rows.clone(), [sequence(p, generated=(4, 4)) for p in params])
    alone = [sampler.sample(rows[i : i + 1].clone(), [sequence(p, generated=(4, 4))])[0] for i, p in enumerate(params)]
    assert together == alone


def test_draws_depend_on_seed_and_position_only() -> None:
    assert uniform(1, 5) == uniform(1, 5)
    assert len({uniform(seed, position) for seed in range(20) for position in range(20)}) == 400
    assert 0 <= uniform(2**64 - 1, 0) < 1


def test_penalties_follow_their_definitions() -> None:
    row = logits(4)
    generated = (10, 10, 11)
    params = SamplingParams(
        temperature=0, repetition_penalty=1.5, frequency_penalty=0.3, presence_penalty=0.2, logprobs=0
    )
    want = row[0].clone()
    for token in {1, 2, 3, 10, 11}:
        want[token] = want[token] / 1.5 if want[token] > 0 else want[token] * 1.5
    for token, count in Counter(generated).items():
        want[token] -= 0.3 * count + 0.2
    changed = row.clone()
    token = Sampler(()).sample(changed, [sequence(params, generated=generated)])[0]
    torch.testing.assert_close(changed[0], want)
    assert token.token_id == int(want.argmax())
    # Logprobs are the model's own.
    assert token.logprob == pytest.approx(float(torch.log_softmax(row[0], -1)[token.token_id]))


def test_end_tokens_are_held_back_until_min_tokens() -> None:
    row = torch.zeros(1, VOCAB)
    row[0, 9] = 10.0
    row[0, 8] = 9.0
    row[0, 7] = 8.0
    held = sequence(SamplingParams(temperature=0, min_tokens=1, stop_token_ids=(8,)))
    free = sequence(SamplingParams(temperature=0, min_tokens=1, stop_token_ids=(8,)), generated=(5,))
    ignoring = sequence(SamplingParams(temperature=0, min_tokens=1, ignore_eos=True))
    tokens = Sampler((9,)).sample(row.expand(3, -1).clone(), [held, free, ignoring])
    assert [t.token_id for t in tokens] == [7, 9, 9]


def test_top_logprobs_are_the_best_tokens_in_order() -> None:
    row = logits(5)
    token = Sampler(()).sample(row.clone(), [sequence(SamplingParams(temperature=0, logprobs=3))])[0]
    values, ids = torch.log_softmax(row[0], -1).topk(3)
    assert [i for i, _ in token.top_logprobs] == ids.tolist()
    assert [v for _, v in token.top_logprobs] == pytest.approx(values.tolist())
    assert token.logprob == pytest.approx(float(values[0]))
