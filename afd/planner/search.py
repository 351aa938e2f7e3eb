"""The search behind `afd plan`: workers, sharding, microbatches and batch, under memory, network and latency limits.

Every topology of a grid is grown to the largest batch that its memory and the time per token allow. The plan is the
cheapest per token; the front holds what no other beats in latency, tokens per card and price at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from afd.errors import ConfigError
from afd.planner.candidates import USABLE, Colocated, Point, Split, most, split
from afd.planner.hardware import Card
from afd.planner.models import Planned
from afd.planner.roofline import Efficiency, Roofline, Workers
from afd.topology import FfnShard, Sharding, ffn_shards

_COUNTS = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128)
_MICROBATCHES = (1, 2, 3, 4)
_FRACTIONS = (1.0, 0.5, 0.25, 0.1)  # of the largest batch: smaller ones are dearer and faster
_SHARDINGS: tuple[Sharding, ...] = ("ep", "tp", "hybrid")


@dataclass(frozen=True, slots=True)
class Ask:
    """What is wanted. `batch` None: as many requests at a time as pay. `cards_per_worker` cards of one server act as
    one worker; `max_workers` of a role at most."""

    model: Planned
    attention: Card
    ffn: Card
    context: int
    tpot_s: float
    batch: int | None = None
    cards_per_worker: int = 8
    max_workers: int = 32
    efficiency: Efficiency = field(default_factory=Efficiency)

    @property
    def counts(self) -> list[int]:
        return [count for count in _COUNTS if count <= self.max_workers]


class Found(NamedTuple):
    """A deployment and how it does. `capped`: memory, latency or batch, which kept the batch from growing."""

    how: Split | Colocated
    point: Point
    capped: str


@dataclass(frozen=True, slots=True)
class Plan:
    """`best` splits; `front` by latency; `colocated` is the cheapest of either card: where its workers
    exchange experts, at the pace that the report measured of such a deployment. `colocated_tuned`: at the same pace as
    `best`. None where it cannot be done."""

    ask: Ask
    best: Found
    front: tuple[Found, ...]
    colocated: Found | None
    colocated_tuned: Found | None


def search(ask: Ask) -> Plan:
    """Raises ConfigError for what cannot be had, with the limit and the nearest that can."""
    splits = list(_splits(ask))
    found = [each for how in splits if (each := _grown(ask, how))]
    if not found:
        raise _impossible(ask, splits)
    points = found if ask.batch is not None else [*found, *_smaller(found)]
    best = min(found, key=_price)
    measured, tuned = ask.efficiency.colocated_pace, ask.efficiency.pace
    return Plan(ask, best, front(points), _cheapest_colocated(ask, measured), _cheapest_colocated(ask, tuned))


def front(found: Iterable[Found]) -> tuple[Found, ...]:
    """Those that no other beats or equals in time per token, tokens per second and card, and price."""
    kept: list[Found] = []
    for each in sorted(found, key=lambda f: (f.point.step_s, _price(f))):
        point = each.point
        beaten = any(
            other.point.usd_per_1m <= point.usd_per_1m
            and other.point.tokens_per_s_per_card >= point.tokens_per_s_per_card
            for other in kept
        )
        if not beaten:
            kept.append(each)
    return tuple(kept)


def _price(found: Found) -> float:
    return found.point.usd_per_1m


def _splits(ask: Ask) -> Iterator[Split]:
    workers = Workers(ask.attention, ask.cards_per_worker), Workers(ask.ffn, ask.cards_per_worker)
    for ffn in ask.counts:
        for sharding, shard in _shards(ask.model, ffn):
            for attention in ask.counts:
                for microbatches in _MICROBATCHES:
                    counts = attention, ffn, microbatches
                    yield split(ask.model, workers, shard, counts, sharding, ask.context, ask.efficiency)


def _cheapest_colocated(ask: Ask, exchange_pace: float) -> Found | None:
    found = [each for how in _colocated(ask, exchange_pace) if (each := _grown(ask, how))]
    return min(found, key=_price, default=None)


def _colocated(ask: Ask, exchange_pace: float) -> Iterator[Colocated]:
    slowed = replace(ask.efficiency, pace=exchange_pace)
    for card in dict.fromkeys((ask.attention, ask.ffn)):
        workers = Workers(card, ask.cards_per_worker)
        for count in ask.counts:
            for _, shard in _shards(ask.model, count):
                how = Colocated(Roofline(ask.model, workers, workers, shard, ask.efficiency), count, ask.context)
                yield replace(how, times=replace(how.times, efficiency=slowed)) if how.exchanges_experts else how


def _shards(model: Planned, ffn: int) -> Iterator[tuple[Sharding, FfnShard]]:
    """Every way in which the experts divide over so many workers."""
    for sharding in _SHARDINGS[:1] if ffn == 1 else _SHARDINGS:
        try:
            yield sharding, ffn_shards(ffn, sharding, model.spec.num_experts)[0]
        except ConfigError:
            continue


def _grown(ask: Ask, how: Split | Colocated) -> Found | None:
    """At the batch asked for, or else the largest that is fast enough; None where it is too slow or does not fit."""
    if ask.batch is not None:
        if ask.batch > how.room or ask.batch < how.step:
            return None
        point = how.at(ask.batch)
        return Found(how, point, "batch") if point.step_s <= ask.tpot_s else None
    grown = most(how, lambda point: point.step_s <= ask.tpot_s)
    if grown is None:
        return None
    return Found(how, grown, "memory" if grown.batch + how.step > how.room else "latency")


def _smaller(found: Iterable[Found]) -> Iterator[Found]:
    for how, point, _ in found:
        for fraction in _FRACTIONS[1:]:
            batch = math.ceil(point.batch * fraction / how.step) * how.step
            if batch < point.batch:
                yield Found(how, how.at(batch), "batch")


def _impossible(ask: Ask, splits: list[Split]) -> ConfigError:
    """Why nothing was found, and the nearest that would be."""
    name, each = ask.model.name, ask.cards_per_worker
    largest = min(splits, key=lambda how: how.times.ffn_memory)
    usable = USABLE * ask.ffn.memory_bytes
    if largest.times.ffn_memory > usable:
        needed = math.ceil(largest.times.ffn_memory * largest.ffn / usable)
        return ConfigError(
            f"the FFN weights of {name} do not fit: over {largest.ffn} workers of {each} {ask.ffn.name} they take "
            f"{largest.times.ffn_memory / 1e9:.1f} GB a card, of {usable / 1e9:.1f} usable; the nearest that fits is "
            f"{needed} workers (--max-workers), or cards with more memory"
        )
    fitting = [how for how in splits if how.room >= how.step]
    if not fitting:
        return _no_room(ask, splits)
    if ask.batch is not None:
        able = [how for how in fitting if how.step <= ask.batch <= how.room]
        if not able:
            most_room = max(fitting, key=lambda how: how.room)
            return ConfigError(
                f"a batch of {ask.batch} requests of {ask.context} tokens does not fit: {most_room.attention} "
                f"attention workers of {each} {ask.attention.name} hold {most_room.room} (--max-workers allows more); "
                f"the nearest is --batch {most_room.room}"
            )
        fastest = min(able, key=lambda how: how.at(ask.batch or 1).step_s)
        point = fastest.at(ask.batch)
    else:
        fastest = min(fitting, key=lambda how: how.at(how.step).step_s)
        point = fastest.at(fastest.step)
    return ConfigError(
        f"{name} cannot give a token every {1e3 * ask.tpot_s:g} ms on these cards: its fastest deployment, {fastest} "
        f"at a batch of {point.batch}, takes {1e3 * point.step_s:.3g} ms, which {_WHY[point.binds]}; the "
        "nearest is --tpot "
        f"{math.ceil(1e4 * point.step_s) / 10:g}ms"
    )


def _no_room(ask: Ask, splits: list[Split]) -> ConfigError:
    """Not one request fits into the attention workers beside their weights."""
    times, usable = splits[0].times, USABLE * ask.attention.memory_bytes
    weights = times.attention_memory(0, ask.context)
    if weights >= usable:
        return ConfigError(
            f"the attention weights of {ask.model.name} do not fit: {weights / 1e9:.1f} GB a card, of "
            f"{usable / 1e9:.1f} usable on {ask.attention.name}; the nearest that fits is a card of "
            f"{math.ceil(weights / USABLE / 1e9)} GB"
        )
    low, high = 1, ask.context
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if times.attention_memory(1, middle) <= usable else (low, middle)
    return ConfigError(
        f"one request of {ask.context} tokens does not fit into a worker of {ask.cards_per_worker} "
        f"{ask.attention.name}, whose cards have {(usable - weights) / 1e9:.1f} GB beside the weights; the "
        f"nearest is --context {low}"
    )


_WHY = {
    "attention": "the attention side's work makes",
    "ffn": "the FFN side's work makes",
    "dispatch": "the wires to the FFN make",
    "combine": "the wires from the FFN make",
    "trip": "the stages of a layer one after another make",
}
