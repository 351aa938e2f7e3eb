"""One way to deploy a model, and how it would do: split (AFD) or colocated.

Both are costed with the same stage times, so that they differ only in what splitting changes: whose batch is whose,
what crosses the network, and which card pays for what.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from afd.planner.models import Planned
from afd.planner.roofline import Efficiency, Roofline, Workers
from afd.planner.stages import Load, Pace, pace
from afd.topology import FfnShard, Sharding

USABLE = 0.9  # of a card's memory: the rest is activations, graphs and the runtime's


@dataclass(frozen=True, slots=True)
class Point:
    """A deployment at one batch. `step_s` is the time per output token. `binds` is what a step mostly waits for: see
    afd.planner.stages.Pace; "compute" or "network" where colocated. `wires`: their share of a microbatch's trip."""

    batch: int
    step_s: float
    cards: int
    usd_per_hour: float
    binds: str
    wires: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.batch / self.step_s

    @property
    def tokens_per_s_per_card(self) -> float:
        return self.tokens_per_s / self.cards

    @property
    def usd_per_1m(self) -> float:
        return self.usd_per_hour / 3600 / self.tokens_per_s * 1e6


@dataclass(frozen=True)
class Split:
    """`attention` and `ffn` workers; the FFN sharded over its workers as `sharding` says, and inside a worker over its
    cards, as slices."""

    times: Roofline
    attention: int
    ffn: int
    microbatches: int
    sharding: Sharding
    context: int

    def __str__(self) -> str:
        in_flight = "1 microbatch" if self.microbatches == 1 else f"{self.microbatches} microbatches"
        return f"{self.attention}A{self.ffn}F, {self.sharding}, {in_flight}"

    @property
    def step(self) -> int:
        """Requests by which a batch can grow: one more in every microbatch."""
        return self.attention * self.microbatches

    @cached_property
    def room(self) -> int:
        """Requests that the attention workers have memory for; 0 where weights alone do not fit."""
        if self.times.ffn_memory > USABLE * self.times.ffn.card.memory_bytes:
            return 0
        return _room(self.times, USABLE * self.times.attention.card.memory_bytes, self.context) * self.attention

    def at(self, batch: int) -> Point:
        times, load = self.times, Load(self.attention, self.ffn, self.microbatches, batch, self.context)
        tokens = load.tokens * self.attention
        skew = self._skew(tokens)
        step_s = self.microbatches * times.ends_s(load.tokens)
        slowest: Pace | None = None
        for layer, count in layer_kinds(times.model):
            found = pace(times, layer, load, skew)
            step_s += count * found.period
            if slowest is None or count * found.period > slowest.period:
                slowest = found
        assert slowest is not None, "a model has layers"
        attention, ffn = times.attention, times.ffn
        usd = self.attention * attention.cards * attention.card.usd_per_hour
        usd += self.ffn * ffn.cards * ffn.card.usd_per_hour
        cards = self.attention * attention.cards + self.ffn * ffn.cards
        wires = (slowest.dispatch + slowest.combine) / slowest.trip
        return Point(batch, step_s, cards, usd, slowest.binds, wires)

    def _skew(self, tokens: float) -> float:
        return expected_skew(self.times.model, self.times.shard.ep, tokens)


@dataclass(frozen=True)
class Colocated:
    """`workers` of one card, each with the attention of its own requests and its share of every FFN layer; two halves
    of a batch take turns, so that one's messages hide behind the other's products (or one, where that is faster)."""

    times: Roofline
    workers: int
    context: int

    def __str__(self) -> str:
        each, card = self.times.attention.cards, self.times.attention.card.name
        return f"{self.workers} colocated worker{'' if self.workers == 1 else 's'} of {each} {card}"

    @property
    def exchanges_experts(self) -> bool:
        """Whether its workers send one another what their gates choose: expert parallelism."""
        return self.workers > 1 and self.times.model.spec.moe is not None

    @property
    def step(self) -> int:
        return self.workers

    @cached_property
    def room(self) -> int:
        usable = USABLE * self.times.attention.card.memory_bytes - self.times.ffn_memory
        return _room(self.times, usable, self.context) * self.workers

    def at(self, batch: int) -> Point:
        one, two = (self._step_s(batch, microbatches) for microbatches in (1, 2))
        step_s, network = min(one, two)
        workers, card = self.times.attention.cards * self.workers, self.times.attention.card
        return Point(batch, step_s, workers, workers * card.usd_per_hour, "network" if network else "compute")

    def _step_s(self, batch: int, microbatches: int) -> tuple[float, bool]:
        """Seconds, and whether the network makes the most of them."""
        times, tokens = self.times, batch / self.workers / microbatches
        skew = expected_skew(times.model, times.shard.ep, tokens * self.workers)
        step_s, waited = microbatches * times.ends_s(tokens), 0.0
        for layer, count in layer_kinds(times.model):
            compute = times.attention_s(layer, tokens, tokens * self.context)
            compute += times.ffn_s(layer, tokens * self.workers, skew)
            network = self._messages(layer) * (times.dispatch_s(layer, tokens) + times.combine_s(layer, tokens))
            network += 2 * times.latency_s if self.workers > 1 else 0.0
            period = max(microbatches * compute, compute + network)
            step_s += count * period
            waited += count * (period - microbatches * compute)
        return step_s, waited > step_s / 2

    def _messages(self, layer: int) -> int:
        """To the workers that have a token's experts, or a slice of what every token goes through."""
        spec, others = self.times.model.spec, self.workers - 1
        return min(others, spec.top_k) if spec.is_moe(layer) and self.times.shard.ep > 1 else others


def split(
    model: Planned,
    workers: tuple[Workers, Workers],
    shard: FfnShard,
    counts: tuple[int, int, int],
    sharding: Sharding,
    context: int,
    efficiency: Efficiency,
) -> Split:
    """`workers` of both roles; `counts`: attention workers, FFN workers, microbatches."""
    times = Roofline(model, *workers, shard, efficiency)
    return Split(times, *counts, sharding, context)


def most(candidate: Split | Colocated, fits: Callable[[Point], bool]) -> Point | None:
    """The largest batch with room in memory that `fits`; larger ones take longer. None where not even the least."""
    low, high = 0, candidate.room // candidate.step
    if high < 1 or not fits(candidate.at(candidate.step)):
        return None
    if fits(candidate.at(high * candidate.step)):
        return candidate.at(high * candidate.step)
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(candidate.at(middle * candidate.step)) else (low, middle)
    return candidate.at(max(1, low) * candidate.step)


def layer_kinds(model: Planned) -> list[tuple[int, int]]:
    """One layer of every kind, and how many there are of it."""
    spec = model.spec
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for layer in range(spec.layers):
        less = spec.hybrid is not None and layer in spec.hybrid.layers
        kinds.setdefault((spec.is_moe(layer), less), []).append(layer)
    return [(layers[0], len(layers)) for layers in kinds.values()]


def expected_skew(model: Planned, ep: int, tokens: float) -> float:
    """The busiest of `ep` groups of experts over an even share, when the gate picks at random: the more picks, the
    nearer to 1. What a real gate prefers comes on top."""
    picks = tokens * model.spec.top_k
    return 1.0 if ep == 1 or picks <= 0 else 1.0 + math.sqrt(2 * math.log(ep) * ep / picks)


def _room(times: Roofline, usable: float, context: int) -> int:
    """Requests on one attention worker whose every card has so many usable bytes."""
    empty, one = times.attention_memory(0, context), times.attention_memory(1, context)
    return max(0, math.floor((usable - empty) / (one - empty)))
