"""Stage times from cards' peaks and the share of them that is reached (an implementation of afd.planner.stages).

A worker is `cards` cards of one server. Attention workers divide their requests over their cards (data parallel, the
output projection apart, report section 6); FFN workers split their shard over theirs. Each stage takes what its memory
traffic or its arithmetic takes, whichever is longer, by `Efficiency`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from afd.planner.hardware import Card
from afd.planner.models import Planned
from afd.planner.stages import Load, step_s
from afd.topology import FfnShard
from afd.types import DType, Role

_ROWS = 64  # of a matrix unit's tile: fewer query heads per KV head than that leave the rest of it idle
_COLUMNS = 128  # the same of an FFN's intermediate: narrower slices are padded
_SCALE_EVERY = 128  # numbers of an FP8 dispatch that share an fp32 scale


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Shares of the cards' peaks. `attention` and `ffn`: of memory bandwidth; 1 and a half are what report section 6
    counts with. `network`: 40 of 50 GB/s are reached (section 5.4). `pace` slows both halves alike: the one number that
    is fitted to a measurement. Its default comes from one row of table 8 (2A2F), and forecasts the other three within
    6 %; tests/unit/planner/test_roofline.py has the figures. `colocated_pace`
    is the same for both halves on the same cards, from the same table's profile of DeepSeek-V3 (EP over 128 cards, 2324
    tokens/s a card at 50 ms): what the report compares itself with. `latency_s` of a message is an assumption."""

    attention: float = 1.0
    ffn: float = 0.5
    network: float = 0.8
    pace: float = 0.750
    colocated_pace: float = 0.393
    latency_s: float = 10e-6


@dataclass(frozen=True, slots=True)
class Workers:
    """One role's: the card, and how many of it a worker has."""

    card: Card
    cards: int = 8


@dataclass(frozen=True, slots=True)
class Roofline:
    """StageTimes of `model` on such workers. `shard` is any FFN worker's (its degrees count). `split` says which of the
    attention's projections the cards of a worker divide among them: none, the output's, or all with their KV heads."""

    model: Planned
    attention: Workers
    ffn: Workers
    shard: FfnShard
    efficiency: Efficiency = Efficiency()
    split: Literal["none", "output", "all"] = "output"

    @property
    def num_layers(self) -> int:
        return self.model.spec.layers

    @property
    def latency_s(self) -> float:
        return self.efficiency.latency_s

    def attention_s(self, layer: int, tokens: float, kv_tokens: float) -> float:
        spec, precision, cards = self.model.spec, self.model.precision, self.attention.cards
        context = kv_tokens / tokens if tokens else 0.0
        each = tokens / cards
        core = self._attention_side(
            each * spec.layer_attention_flops(layer, context) * self._row_padding,
            each * spec.layer_kv_bytes(layer, context, precision.kv, precision.window),
            precision.kv,
        )
        parameters = spec.layer_projection_parameters(layer)
        divided = {"none": 0, "output": spec.attention.output_parameters(spec.hidden), "all": parameters}[self.split]
        held = parameters - divided * (1 - 1 / cards)
        linear = self._attention_side(2 * each * parameters, held * precision.weights.itemsize, precision.weights)
        return core + linear

    def ends_s(self, tokens: float) -> float:
        spec, dtype, cards = self.model.spec, self.model.precision.weights, self.attention.cards
        weights = spec.vocab * spec.hidden / cards  # its cards divide the vocabulary
        return self._attention_side(2 * tokens * weights, weights * dtype.itemsize, dtype)

    def ffn_s(self, layer: int, tokens: float, skew: float = 1.0) -> float:
        spec, dtype = self.model.spec, self.model.precision.weights
        cards = self.ffn.cards * self.shard.size
        flops = tokens * spec.layer_ffn_flops(layer) * skew * self._column_padding(layer) / cards
        read = spec.layer_ffn_parameters(layer, tokens) * dtype.itemsize / cards
        card, reached = self.ffn.card, self.efficiency
        return max(flops / card.flops(dtype), read / (card.memory_bandwidth * reached.ffn)) / reached.pace

    def dispatch_s(self, layer: int, tokens: float) -> float:
        spec, dtype = self.model.spec, self.model.precision.weights
        each = spec.dispatch_bytes_per_token(layer, dtype)
        if dtype is DType.FP8:
            each += 4 * math.ceil(spec.hidden / _SCALE_EVERY)
        return self._wire(tokens * each)

    def combine_s(self, layer: int, tokens: float) -> float:
        spec = self.model.spec
        dtype = DType.FP32 if self.model.precision.weights is DType.FP32 else DType.BF16
        del layer  # every layer's partial sums are as large
        return self._wire(tokens * spec.combine_bytes_per_token(dtype))

    def attention_memory(self, requests: float, context: float) -> float:
        """Bytes on each card of an attention worker that holds so many requests."""
        spec, precision, cards = self.model.spec, self.model.precision, self.attention.cards
        output = spec.layers * spec.attention.output_parameters(spec.hidden) if self.split == "output" else 0
        divided = output + (1 if spec.tied_head else 2) * spec.vocab * spec.hidden
        weights = (spec.parameters(Role.ATTENTION) - divided * (1 - 1 / cards)) * precision.weights.itemsize
        return weights + requests / cards * spec.held_bytes(context, precision.kv, precision.window)

    @property
    def ffn_memory(self) -> float:
        """Bytes on each card of an FFN worker."""
        whole = self.model.spec.weight_bytes(Role.FFN, self.model.precision.weights)
        return whole / (self.shard.size * self.ffn.cards)

    @property
    def link_bandwidth(self) -> float:
        """Bytes per second that a worker moves each way at most, to a worker of the other role."""
        attention, ffn = self.attention, self.ffn
        narrower = min(attention.card.net_bandwidth * attention.cards, ffn.card.net_bandwidth * ffn.cards)
        return narrower * self.efficiency.network

    def _wire(self, num_bytes: float) -> float:
        return num_bytes / self.link_bandwidth

    def _attention_side(self, flops: float, num_bytes: float, dtype: DType) -> float:
        card, reached = self.attention.card, self.efficiency
        return max(flops / card.flops(dtype), num_bytes / (card.memory_bandwidth * reached.attention)) / reached.pace

    @property
    def _row_padding(self) -> float:
        attention = self.model.spec.attention
        rows = attention.heads / (1 if attention.kind == "mla" else attention.kv_heads)
        return math.ceil(rows / _ROWS) * _ROWS / rows

    def _column_padding(self, layer: int) -> float:
        spec = self.model.spec
        if spec.moe is not None and spec.is_moe(layer):
            width = spec.moe.intermediate / (self.shard.tp * self.ffn.cards)
        else:
            width = spec.dense_intermediate / (self.shard.size * self.ffn.cards)
        return math.ceil(width / _COLUMNS) * _COLUMNS / width


def fit_pace(times: Roofline, load: Load, measured_step_s: float) -> Roofline:
    """The same, slowed (or sped up) so that a step of `load` takes what was measured. Raises ValueError where no pace
    does, because the wires alone take longer."""
    low, high = 1e-6, 100.0

    def at(pace: float) -> Roofline:
        return replace(times, efficiency=replace(times.efficiency, pace=pace))

    if step_s(at(high), load) > measured_step_s:
        raise ValueError(f"a step of {load} takes {step_s(at(high), load):g} s of wires alone, not {measured_step_s:g}")
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if step_s(at(middle), load) > measured_step_s else (low, middle)
    return at(high)
