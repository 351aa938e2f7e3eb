"""What a decoded token must cost at least on a card, by the Step-3 report's formulas (arXiv 2507.19427, section 4.2).

attention: max(FLOPs · u_flop, KV bytes · u_byte) + projections' FLOPs · u_flop; FFN: FLOPs · u_flop. That is a card at
its peak all the time, with weights read for so many tokens at once that their reading costs nothing (`core_usd`,
`linear_usd`, `ffn_usd`: what `afd cost` shows). At a batch of B tokens it does (`half_cost`: what `afd bench` sets
beside a measurement): a half then costs at least the reading of its weights, shared by B; and the LM head, which the
report leaves out, counts with the attention half, where it runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from afd.planner.hardware import Card
from afd.planner.models import Planned, Precision
from afd.spec import ModelSpec
from afd.types import DType, Role


@dataclass(frozen=True, slots=True)
class HalfCost:
    """USD per decoded token of one half on `card`."""

    card: str
    ideal: float  # the report's
    at_batch: float  # with the weights read once for a batch


def core_usd(model: Planned, card: Card, context: float) -> float:
    """Attention without its projections: reading the KV cache or computing, whichever costs more. As in the report, all
    is computed at the rate of the weights' precision, whatever the cache is kept in."""
    flops = model.spec.attention_flops_per_token(round(context)) * card.usd_per_flop(model.precision.weights)
    return max(flops, model.kv_bytes(context) * card.usd_per_byte)


def attention_usd(model: Planned, card: Card, context: float) -> float:
    """The attention half of one token, by the report: no LM head, and weights that cost nothing to read."""
    linear = model.spec.linear_flops_per_token * card.usd_per_flop(model.precision.weights)
    return core_usd(model, card, context) + linear


def ffn_usd(model: Planned, card: Card) -> float:
    """The FFN half of one token."""
    return model.spec.ffn_flops_per_token * card.usd_per_flop(model.precision.weights)


def half_cost(spec: ModelSpec, role: Role, card: Card, dtype: DType, context: float, batch: float) -> HalfCost:
    """One half's, everything in `dtype`. `context`: tokens that a decoded one sees; `batch`: tokens that share a
    reading of the weights."""
    core = core_usd(Planned(spec.family, spec, Precision(dtype, dtype)), card, context)
    flops = spec.ffn_flops_per_token
    if role is Role.ATTENTION:
        flops = spec.linear_flops_per_token + spec.head_flops_per_token
    else:
        core = 0.0
    rest = flops * card.usd_per_flop(dtype)
    weights = _bytes_read(spec, role, dtype, batch) / batch * card.usd_per_byte
    return HalfCost(card.name, core + rest, core + max(rest, weights))


def cheapest(
    spec: ModelSpec, role: Role, cards: Iterable[Card], dtype: DType, context: float, batch: float
) -> HalfCost:
    """On the card whose ideal cost is least."""
    return min((half_cost(spec, role, card, dtype, context, batch) for card in cards), key=lambda cost: cost.ideal)


def _bytes_read(spec: ModelSpec, role: Role, dtype: DType, batch: float) -> float:
    """Of the weights that a batch needs: of the embedding no more than a few rows, unless it is the LM head too."""
    if role is Role.FFN:
        return sum(spec.layer_ffn_parameters(layer, batch) for layer in range(spec.layers)) * dtype.itemsize
    embedding = 0 if spec.tied_head else spec.vocab * spec.hidden
    return (spec.parameters(role) - embedding) * dtype.itemsize


# What a deployment needs for those costs to be reached (sections 5.3 and 5.4).


def ideal_ffn_batch(model: Planned, card: Card) -> float:
    """Tokens that must reach the FFN together for it to compute as fast as the card can, rather than read weights."""
    dtype = model.precision.weights
    return card.roofline(dtype) * dtype.itemsize / 2 / model.sparsity


def minimum_sparsity(model: Planned, card: Card, tpot_s: float = 0.050) -> float:
    """The sparsest experts that the card's network still keeps busy: 3 bytes per number there and back (8 bits out, 16
    back) for an ideal batch, within a third of the time per token. Above 1: no model's network can be hidden."""
    spec, dtype = model.spec, model.precision.weights
    stage_s = tpot_s / 3
    moved = 3 * spec.hidden * spec.layers * card.flops(dtype) * dtype.itemsize / 2
    return moved / (card.server_net_bandwidth * card.memory_bandwidth * stage_s)
