"""How long each stage of a layer takes: the clock that plans, simulations and calibrations share.

A microbatch goes through a layer in four stages: its attention half on one attention worker, the dispatch to every FFN
worker, the FFN half there, and the combine back. `StageTimes` gives each stage's seconds and nothing else; who waits
for whom, in which order, is its caller's affair (`period_s` is the answer in closed form for a pipeline without
jitter, the simulator plays it out event by event). Implementations: `afd.planner.roofline` from cards' peaks and
efficiencies; a profile measured on a machine may be another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class StageTimes(Protocol):
    """Seconds of one stage for one worker. Pure: the same arguments give the same seconds, from any thread.

    Every time is finite, at least 0, and does not fall when `tokens`, `kv_tokens` or `skew` grow. Zero tokens are legal
    and still take what a stage takes for being there at all. `layer` is 0 to num_layers - 1. A fractional number of
    tokens is a mean. Nothing here raises but for a layer that does not exist (IndexError).
    """

    @property
    def num_layers(self) -> int:
        """Layers of the model, each of which is passed once a step."""

    def attention_s(self, layer: int, tokens: float, kv_tokens: float) -> float:
        """The attention half of `layer`, with its projections, norms and gate, on one attention worker: `tokens` of one
        microbatch that decode, and see `kv_tokens` tokens of context together (so uneven contexts are told by their
        sum)."""

    def ends_s(self, tokens: float) -> float:
        """Embedding, final norm, LM head and sampling: once a step and microbatch, on its attention worker."""

    def ffn_s(self, layer: int, tokens: float, skew: float = 1.0) -> float:
        """The FFN half of `layer` on one FFN worker's shard: `tokens` joined from however many dispatches. `skew` is
        the load on this worker's experts over an even share of the whole (1: even)."""

    def dispatch_s(self, layer: int, tokens: float) -> float:
        """One attention worker's `tokens` of one microbatch to ONE FFN worker: how long they keep the sender's outlet
        (and the receiver's inlet) busy. Inlets and outlets are independent of each other; messages at one of them pass
        one after another."""

    def combine_s(self, layer: int, tokens: float) -> float:
        """The partial sums of `tokens` from ONE FFN worker back to one attention worker; as dispatch_s."""

    @property
    def latency_s(self) -> float:
        """What a message takes besides, without keeping anything busy; once each way."""


@dataclass(frozen=True, slots=True)
class Pace:
    """One layer of one step, in seconds: how long each stage keeps its side busy for one microbatch, and `period`, from
    one passage of a microbatch to its next. `binds` names what the period is made of."""

    attention: float
    dispatch: float
    ffn: float
    combine: float
    latency: float
    period: float
    binds: str  # attention, ffn, dispatch, combine, or trip: the stages one after another, with too few microbatches

    @property
    def trip(self) -> float:
        """One microbatch alone through the layer."""
        return self.attention + self.dispatch + self.ffn + self.combine + 2 * self.latency


@dataclass(frozen=True, slots=True)
class Load:
    """What runs: `attention` and `ffn` workers, `microbatches` in flight on every attention worker, `batch` requests in
    all of them together, each with `context` tokens."""

    attention: int
    ffn: int
    microbatches: int
    batch: float
    context: float

    @property
    def tokens(self) -> float:
        """Of one microbatch on one attention worker."""
        return self.batch / (self.microbatches * self.attention)


def pace(times: StageTimes, layer: int, load: Load, skew: float = 1.0) -> Pace:
    """One layer of a pipeline without jitter, in which the FFN workers join one microbatch of every attention worker.

    No side can be passed more often than its work allows, and no microbatch can start a layer before it has come back
    from the last: period = max(microbatches x the busiest side, the whole trip). `skew` is the busiest FFN worker's.
    """
    tokens = load.tokens
    attention = times.attention_s(layer, tokens, tokens * load.context)
    ffn = times.ffn_s(layer, tokens * load.attention, skew)
    # Whichever end of the wires has more messages to pass.
    messages = max(load.attention, load.ffn)
    dispatch, combine = messages * times.dispatch_s(layer, tokens), messages * times.combine_s(layer, tokens)
    busiest = {"attention": attention, "ffn": ffn, "dispatch": dispatch, "combine": combine}
    binds = max(busiest, key=lambda name: busiest[name])
    trip = attention + dispatch + ffn + combine + 2 * times.latency_s
    period = load.microbatches * busiest[binds]
    if trip > period:
        binds, period = "trip", trip
    return Pace(attention, dispatch, ffn, combine, times.latency_s, period, binds)


def step_s(times: StageTimes, load: Load, skew: float = 1.0) -> float:
    """A step, which is the time per output token: every layer, and the ends, which share the attention side with the
    other microbatches."""
    layers = sum(pace(times, layer, load, skew).period for layer in range(times.num_layers))
    return layers + load.microbatches * times.ends_s(load.tokens)
