"""What every StageTimes promises, held against the one from cards' peaks; and the pipeline's closed form."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd.planner.hardware import CARDS
from afd.planner.models import MODELS
from afd.planner.roofline import Roofline, Workers
from afd.planner.stages import Load, StageTimes, pace, step_s
from afd.topology import FfnShard

SERVER = Workers(CARDS["H800"], 8)


def times_of(name: str) -> Roofline:
    return Roofline(MODELS[name], SERVER, SERVER, FfnShard(0, 2, 1))


TIMES: dict[str, StageTimes] = {
    name: times_of(name) for name in ("step3", "minimax-m1", "llama4-maverick", "qwen3-32b")
}
TOKENS = st.floats(0, 1e5)


@given(
    name=st.sampled_from(list(TIMES)),
    layer=st.integers(0, 47),
    tokens=TOKENS,
    more=TOKENS,
    context=st.floats(0, 1e5),
    skew=st.floats(1, 10),
)
def test_times_are_finite_and_never_fall_as_work_grows(
    name: str, layer: int, tokens: float, more: float, context: float, skew: float
) -> None:
    times, most = TIMES[name], tokens + more
    pairs = [
        (times.attention_s(layer, tokens, tokens * context), times.attention_s(layer, most, most * context)),
        (times.attention_s(layer, most, 0), times.attention_s(layer, most, most * context)),
        (times.ffn_s(layer, tokens), times.ffn_s(layer, most)),
        (times.ffn_s(layer, tokens), times.ffn_s(layer, tokens, skew)),
        (times.dispatch_s(layer, tokens), times.dispatch_s(layer, most)),
        (times.combine_s(layer, tokens), times.combine_s(layer, most)),
        (times.ends_s(tokens), times.ends_s(most)),
    ]
    for less, greater in pairs:
        assert isfinite(greater)
        assert 0 <= less <= greater * (1 + 1e-9)
    assert times.latency_s >= 0


@given(name=st.sampled_from(list(TIMES)), microbatches=st.integers(1, 4), batch=st.integers(1, 20_000))
def test_more_bandwidth_never_makes_a_step_slower(name: str, microbatches: int, batch: int) -> None:
    load = Load(2, 2, microbatches, batch, 8192)
    card = CARDS["H800"]
    better = [
        replace(card, net_bandwidth=2 * card.net_bandwidth),
        replace(card, memory_bandwidth=2 * card.memory_bandwidth),
        replace(card, bf16_flops=2 * card.bf16_flops, fp8_flops=4e15),
    ]
    plain = step_s(times_of(name), load)
    for each in better:
        workers = Workers(each, 8)
        assert step_s(replace(times_of(name), attention=workers, ffn=workers), load) <= plain * (1 + 1e-9)


@dataclass(frozen=True)
class Scripted:
    """A clock whose stages take what they are told to, whatever the work."""

    attention: float
    dispatch: float
    ffn: float
    combine: float
    num_layers: int = 3
    latency_s: float = 0.0

    def attention_s(self, layer: int, tokens: float, kv_tokens: float) -> float:
        return self.attention

    def ends_s(self, tokens: float) -> float:
        return 0.5

    def ffn_s(self, layer: int, tokens: float, skew: float = 1.0) -> float:
        return self.ffn * skew

    def dispatch_s(self, layer: int, tokens: float) -> float:
        return self.dispatch

    def combine_s(self, layer: int, tokens: float) -> float:
        return self.combine


@pytest.mark.parametrize(
    ("times", "load", "binds", "period"),
    [
        (Scripted(4, 1, 3, 1), Load(1, 1, 3, 3, 1), "attention", 12),  # three in flight: attention never rests
        (Scripted(4, 1, 3, 1), Load(1, 1, 1, 3, 1), "trip", 9),  # one: everything in turn
        (Scripted(3, 1, 4, 1), Load(1, 1, 2, 3, 1), "trip", 9),  # two: still more wire than they hide
        (Scripted(3, 1, 4, 1), Load(1, 1, 3, 3, 1), "ffn", 12),
        (Scripted(3, 1, 4, 3), Load(4, 1, 2, 8, 1), "combine", 24),  # four answers leave one FFN worker, one by one
        (Scripted(3, 3, 4, 1), Load(1, 4, 2, 8, 1), "dispatch", 24),  # and one attention worker sends to four
    ],
)
def test_a_period_is_the_busiest_sides_turns_or_the_trip(
    times: Scripted, load: Load, binds: str, period: float
) -> None:
    found = pace(times, 0, load)
    assert (found.binds, found.period) == (binds, period)
    assert step_s(times, load) == 3 * period + load.microbatches * 0.5
