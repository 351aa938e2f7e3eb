"""What a token cost, from prices and counters, and the least it could."""

from __future__ import annotations

import math

import pytest

from afd.errors import ConfigError
from afd.loadtest import busy, cost
from afd.loadtest.busy import Samples
from afd.loadtest.prices import Price, Prices, Worker
from afd.planner.hardware import CARDS
from afd.spec import AttentionSpec, ModelSpec, MoeSpec, RopeSpec
from afd.types import DType

SPEC = ModelSpec(
    family="step3",
    layers=4,
    hidden=64,
    vocab=300,
    max_context=1024,
    norm_eps=1e-5,
    tied_head=True,
    attention=AttentionSpec("mfa", 4, 1, 32, q_rank=48),
    rope=RopeSpec(32, 10_000.0),
    dense_intermediate=96,
    moe=MoeSpec((1, 2), 8, 2, 40, 24, True),
)
A0, A1, F0 = Worker("attention", 0), Worker("attention", 1), Worker("ffn", 0)


def exposed(scale: float) -> str:
    """/metrics of a cluster that has run for a while."""
    seconds = {
        ("attention", 0): {"attention": 3.0, "wait": 1.0, "idle": 1.0},
        ("ffn", 0): {"ffn": 2.0, "gather": 1.0, "idle": 2.0},
    }
    lines = ["# TYPE afd_activity_seconds_total counter", 'afd_activity_seconds_created{role="ffn"} 1.0']
    for (role, rank), activities in seconds.items():
        for name, value in activities.items():
            labels = f'role="{role}",rank="{rank}",activity="{name}"'
            lines.append(f"afd_activity_seconds_total{{{labels}}} {value * scale}")
    return "\n".join(lines)


def test_busy_shares_come_from_the_difference_of_the_counters_at_the_windows_ends() -> None:
    samples = Samples(
        [(0.0, busy.read(exposed(1.0))), (10.0, busy.read(exposed(3.0))), (20.0, busy.read(exposed(9.0)))]
    )
    assert samples.shares(2.0, 13.0)[A0] == pytest.approx({"attention": 0.6, "wait": 0.2, "idle": 0.2})
    assert samples.busy(2.0, 13.0) == pytest.approx({A0: 0.6, F0: 0.4})


def test_between_readings_the_counters_are_taken_in_proportion() -> None:
    before, after = {(A0, "attention"): 1.0, (A0, "idle"): 1.0}, {(A0, "attention"): 1.0, (A0, "idle"): 11.0}
    later = {(A0, "attention"): 11.0, (A0, "idle"): 11.0}
    samples = Samples([(0.0, before), (10.0, after), (20.0, later)])
    assert samples.busy(5.0, 15.0) == pytest.approx({A0: 0.5})
    assert samples.busy(0.0, 10.0) == pytest.approx({A0: 0.0})
    assert samples.busy(12.0, 30.0) == pytest.approx({A0: 1.0})


def test_one_reading_says_nothing() -> None:
    assert Samples([(0.0, busy.read(exposed(1.0)))]).shares(0.0, 1.0) == {}
    assert busy.read("vllm:num_requests_running 3.0\n") == {}


def test_the_split_adds_up_to_the_price_of_a_million_tokens() -> None:
    prices = Prices.parse("attention=3.6,attention_rank:1=7.2,ffn=1.8")
    found = cost.split(prices, {A0: 0.5, A1: 0.25, F0: 0.1}, tokens_per_s=1000.0, served=None)
    assert found.usd_per_hour == pytest.approx(12.6)
    assert found.total == pytest.approx(12.6 / 3600 / 1000 * 1e6)
    assert found.attention == pytest.approx((1.8 + 1.8) / 3.6)
    assert found.ffn == pytest.approx(0.18 / 3.6)
    assert found.idle is not None
    assert found.attention is not None
    assert found.ffn is not None
    assert found.attention + found.ffn + found.idle == pytest.approx(found.total)


def test_no_tokens_cost_more_than_any_number() -> None:
    assert cost.whole(Price(1.0), 0.0, "").total == math.inf


def test_theory_takes_the_named_card_or_else_the_cheapest_for_the_half() -> None:
    served = cost.Served(SPEC, DType.BF16, context=100.0, batch=4.0)
    named = cost.split(Prices.parse("attention=A800,ffn=910b"), {A0: 0.5, F0: 0.5}, 10.0, served)
    assert [part.card for part in named.theory] == ["A800", "910B"]
    assert named.usd_per_hour == pytest.approx(0.75 + 0.67)
    found = cost.split(Prices.parse("attention=1,ffn=1"), {A0: 0.5, F0: 0.5}, 10.0, served)
    for role, part in zip(("attention", "ffn"), found.theory, strict=True):
        every = [
            cost.split(Prices.parse(f"attention={card},ffn={card}"), {A0: 1.0, F0: 1.0}, 10.0, served).theory
            for card in CARDS
        ]
        assert part.ideal == min(half.ideal for halves in every for half in halves if half.role == role)
        assert part.at_batch >= part.ideal
    assert found.theory_ideal == pytest.approx(sum(part.ideal for part in found.theory))


def test_a_total_stands_alone_and_cards_have_list_prices() -> None:
    assert Prices.parse("total=H800").total == Price(2.0, CARDS["H800"])
    assert Prices.parse("attention=1,ffn=2").total is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "attention",
        "attention=",
        "attention=H9000",
        "attention=-1",
        "attention=inf",
        "gate=1",
        "ffn=1,ffn=2",
        "total=1,ffn=2",
        "attention_rank:x=1",
        "attention_rank=1",
    ],
)
def test_prices_that_cannot_be_are_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="--prices"):
        Prices.parse(text)


def test_a_worker_without_a_price_and_a_price_without_a_worker_are_named() -> None:
    with pytest.raises(ConfigError, match="says nothing about ffn_rank:0"):
        Prices.parse("attention=1").of([A0, F0])
    with pytest.raises(ConfigError, match="attention_rank:7, which this server does not have"):
        Prices.parse("attention=1,ffn=1,attention_rank:7=2").of([A0, F0])
