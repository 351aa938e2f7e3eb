"""What a half costs at a batch: the report's figures (arXiv 2507.19427, table 6), the LM head, and weights' reading."""

from __future__ import annotations

import pytest

from afd.planner.cost import cheapest, half_cost
from afd.planner.hardware import CARDS
from afd.spec import AttentionSpec, ModelSpec, MoeSpec, RopeSpec
from afd.types import DType, Role

LAYERS = 61
STEP3 = ModelSpec(
    family="step3",
    layers=LAYERS,
    hidden=7168,
    vocab=128815,
    max_context=65536,
    norm_eps=1e-5,
    tied_head=False,
    attention=AttentionSpec("mfa", 64, 1, 256, q_rank=2048),
    rope=RopeSpec(256, 500_000.0),
    dense_intermediate=18432,
    moe=MoeSpec(tuple(range(4, 60)), 48, 3, 5120, 5120, True),
)
HUGE = 1e12  # a batch that makes the reading of weights cost nothing
# USD per million tokens: attention at 8K and 32K, FFN.
TABLE_6 = {"H800": (0.048, 0.176, 0.015), "H20": (0.040, 0.114, 0.040), "A800": (0.040, 0.120, 0.036),
           "910B": (0.043, 0.133, 0.035)}  # fmt: skip


def without_head(card: str, context: int) -> float:
    """USD per million tokens; the report leaves the LM head out."""
    c = CARDS[card]
    found = half_cost(STEP3, Role.ATTENTION, c, DType.FP8, context, HUGE).ideal
    return 1e6 * (found - STEP3.head_flops_per_token * c.usd_per_flop(DType.FP8))


@pytest.mark.parametrize("card", TABLE_6)
def test_step3s_costs_are_table_6s(card: str) -> None:
    at_8k, at_32k, ffn = TABLE_6[card]
    assert without_head(card, 8192) == pytest.approx(at_8k, abs=0.001)
    assert without_head(card, 32768) == pytest.approx(at_32k, abs=0.001)
    assert 1e6 * half_cost(STEP3, Role.FFN, CARDS[card], DType.FP8, 8192, HUGE).ideal == pytest.approx(ffn, abs=0.001)


def test_the_cheapest_card_of_each_half_is_the_reports() -> None:
    assert cheapest(STEP3, Role.FFN, CARDS.values(), DType.FP8, 8192, HUGE).card == "H800"
    assert cheapest(STEP3, Role.ATTENTION, CARDS.values(), DType.FP8, 32768, HUGE).card == "H20"


@pytest.mark.parametrize("role", Role)
def test_a_batch_of_one_pays_for_the_weights_it_reads_and_a_huge_one_only_for_its_flops(role: Role) -> None:
    card = CARDS["H800"]
    one, huge = (half_cost(STEP3, role, card, DType.BF16, 4096, batch) for batch in (1.0, HUGE))
    assert huge.at_batch == pytest.approx(huge.ideal)
    active = (
        STEP3.ffn_flops_per_token if role is Role.FFN else STEP3.linear_flops_per_token + STEP3.head_flops_per_token
    )
    reading = active / 2 * DType.BF16.itemsize * card.usd_per_byte  # every active weight is read once, for one token
    core = one.ideal - active * card.usd_per_flop(DType.BF16)
    assert one.at_batch - core == pytest.approx(reading, rel=0.01)
