"""Gathering makes the FFN side's batches larger, and does not let a slow attention worker hold up the others."""

from __future__ import annotations

import time
from collections.abc import Generator

import pytest
from torch import Tensor

from afd.models.halves import AttentionHalf, AttentionOutput, KvView
from afd.types import SamplingParams
from tests.rig import Rig, finished, split, tiny, weights_of

LAYER_S = 0.002  # one layer's attention half of the undisturbed worker; long beside what the machine's noise adds
TOKENS = 24
PARAMS = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)


class Paced(AttentionHalf):
    """An attention half that takes `layer_s` seconds a layer, on a device of its own as it were."""

    def __init__(self, half: AttentionHalf, layer_s: float) -> None:
        self.spec = half.spec
        self._half = half
        self._layer_s = layer_s

    def embed(self, token_ids: Tensor) -> Tensor:
        return self._half.embed(token_ids)

    def layer(self, layer: int, hidden: Tensor, positions: Tensor, kv: KvView) -> AttentionOutput:
        until = time.perf_counter() + self._layer_s
        out = self._half.layer(layer, hidden, positions, kv)
        time.sleep(max(0.0, until - time.perf_counter()))
        return out

    def head(self, hidden: Tensor) -> Generator[None, None, Tensor]:
        return self._half.head(hidden)


def pace(rig: Rig, attention_rank: int, layer_s: float) -> None:
    for microbatch in rig.engines[attention_rank].microbatches:
        microbatch.model = Paced(microbatch.model, layer_s)


def tokens_per_s(rig: Rig, attention_rank: int) -> float:
    """Decode rate of one worker while every other one has work throughout."""
    others = [rank for rank in range(len(rig.engines)) if rank != attention_rank]
    long = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    background = [rig.submit(f"other {rank}", (1, 2, 3), long, rank) for rank in others]
    for result in background:
        assert result.started.wait(30.0)
    started = time.perf_counter()
    finished(rig.submit("measured", (4, 5, 6), PARAMS, attention_rank))
    took_s = time.perf_counter() - started
    for rank in others:
        assert not rig.results[f"other {rank}"].ended.is_set(), "the other worker ran out of work"
        rig.engines[rank].cancel(0, f"other {rank}")
    return TOKENS / took_s


def measure(slowed: float) -> float:
    spec = tiny("step3")
    with split(spec, weights_of(spec), "2A1F", microbatches=1, transport="inproc", gather_window_s=1e-3) as rig:
        pace(rig, 0, LAYER_S)
        pace(rig, 1, LAYER_S * slowed)
        return tokens_per_s(rig, 0)


def test_a_worker_slowed_three_times_costs_the_other_less_than_a_tenth() -> None:
    rates = [(measure(1.0), measure(3.0)) for _ in range(3)]  # in turn, since the machine has moods
    even, beside_slow = (max(column) for column in zip(*rates, strict=True))
    print(f"{even:.0f} tokens/s beside an equal worker, {beside_slow:.0f} beside one slowed three times")
    assert beside_slow >= 0.9 * even


@pytest.mark.parametrize("attention", [2, 3])
def test_gathering_joins_workers_that_run_alike(attention: int) -> None:
    spec = tiny("step3")
    topology = f"{attention}A1F"
    with split(
        spec, weights_of(spec), topology, microbatches=1, transport="inproc", gather_window_s=5 * LAYER_S
    ) as rig:
        for rank in range(attention):
            pace(rig, rank, LAYER_S)
        results = [rig.submit(str(rank), (1, 2, 3), PARAMS, rank) for rank in range(attention)]
        for result in results:
            finished(result)
        counters = rig.loops[0].counters
        assert counters.dispatches == attention * TOKENS * spec.layers
        assert counters.dispatches / counters.calls > 1.3, f"{counters.dispatches} dispatches in {counters.calls} calls"
