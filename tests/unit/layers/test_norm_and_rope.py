"""Norms and rotary embedding, against their definitions (tests/equivalence compares every kind of rope)."""

from __future__ import annotations

import math

import pytest
import torch

from afd.layers.norm import RmsNorm
from afd.layers.rope import RotaryEmbedding, inverse_frequencies
from afd.spec import RopeSpec

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_of_weight_one_gives_unit_mean_square(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(5, 3, 64) * 100).to(dtype)
    before = x.clone()
    y = RmsNorm(torch.ones(64, dtype=dtype), 1e-6)(x)
    assert y.dtype == dtype
    assert torch.equal(x, before), "the input is the residual: it must stay as it was"
    torch.testing.assert_close(y.float().square().mean(-1), torch.ones(5, 3), rtol=0.02, atol=0.0)


def test_epsilon_keeps_a_zero_row_finite_and_is_added_to_the_mean_square() -> None:
    norm = RmsNorm(torch.full((4,), 2.0), 0.25)
    torch.testing.assert_close(norm(torch.zeros(1, 4)), torch.zeros(1, 4))
    torch.testing.assert_close(norm(torch.full((1, 4), 0.5)), torch.full((1, 4), 2 * 0.5 / math.sqrt(0.5)))


def test_scores_after_rotation_depend_on_distance_alone() -> None:
    torch.manual_seed(0)
    rope = RotaryEmbedding(RopeSpec(32, 10000.0), 1000, torch.float32, CPU)
    q, k = torch.randn(1, 2, 32), torch.randn(1, 2, 32)

    def score(q_at: int, k_at: int) -> torch.Tensor:
        return (rope(q, torch.tensor([q_at])) * rope(k, torch.tensor([k_at]))).sum(-1)

    torch.testing.assert_close(score(7, 3), score(907, 903), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(rope(q, torch.tensor([0])), q)
    torch.testing.assert_close(rope(q, torch.tensor([999])).norm(dim=-1), q.norm(dim=-1))


def test_pairs_are_i_and_i_plus_half() -> None:
    rope = RotaryEmbedding(RopeSpec(4, 10000.0), 10, torch.float32, CPU)
    turned = rope(torch.tensor([[[1.0, 0.0, 0.0, 0.0]]]), torch.tensor([3]))
    torch.testing.assert_close(turned[0, 0], torch.tensor([math.cos(3), 0.0, math.sin(3), 0.0]))


def test_longrope_takes_its_long_factors_once_the_model_is_longer_than_it_was() -> None:
    spec = RopeSpec(
        8,
        100.0,
        kind="longrope",
        factor=4.0,
        original_max_position=64,
        short_factors=(1.0, 1.0, 2.0, 2.0),
        long_factors=(3.0, 4.0, 5.0, 6.0),
    )
    plain, _ = inverse_frequencies(RopeSpec(8, 100.0), 64)
    short, scaling = inverse_frequencies(spec, 64)
    long, _ = inverse_frequencies(spec, 65)
    torch.testing.assert_close(short, plain / torch.tensor(spec.short_factors))
    torch.testing.assert_close(long, plain / torch.tensor(spec.long_factors))
    assert scaling == pytest.approx(math.sqrt(1 + math.log(4) / math.log(64)))


def test_frequencies_of_a_factor_list_can_express_any_row() -> None:
    """How three rotary heads of 64 become one of 192: factor i = theta^((i mod 32)/32 - i/96)."""
    theta = 100000.0
    factors = tuple(theta ** ((i % 32) / 32 - i / 96) for i in range(96))
    spec = RopeSpec(
        192,
        theta,
        kind="longrope",
        original_max_position=8192,
        short_factors=factors,
        long_factors=factors,
    )
    wide, scaling = inverse_frequencies(spec, 8192)
    narrow, _ = inverse_frequencies(RopeSpec(64, theta), 8192)
    torch.testing.assert_close(wide, narrow.repeat(3))
    assert scaling == 1.0
