"""What a decoded token must cost at least on a card, by the Step-3 report's formulas (arXiv 2507.19427, section 4.2).

attention: max(FLOPs · u_flop, KV bytes · u_byte) + projections' FLOPs · u_flop; FFN: FLOPs · u_flop. That is a card at
its peak all the time, with weights read for so many tokens at once that their reading costs nothing. At a batch of B
tokens it does: a half then costs at least the reading of its weights, shared by B. The LM head, which the report leaves
out, counts with the attention half, where it runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from afd.planner.hardware import Card
from afd.spec import ModelSpec
from afd.types import DType, Role


@dataclass(frozen=True, slots=True)
class HalfCost:
    """USD per decoded token of one half on `card`."""

    card: str
    ideal: float  # the report's
    at_batch: float  # with the weights read once for a batch


def half_cost(spec: ModelSpec, role: Role, card: Card, dtype: DType, context: float, batch: float) -> HalfCost:
    """One half's. `context`: tokens that a decoded one sees; `batch`: tokens that share a reading of the weights."""
    kv_bytes = attention_flops = 0.0
    if role is Role.ATTENTION:
        kv_bytes = spec.kv_bytes_per_token(dtype) * context
        attention_flops = spec.attention_flops_per_token(round(context))
    u_flop, u_byte = card.usd_per_flop(dtype), card.usd_per_byte
    rest = (spec.half_flops_per_token(role, round(context)) - attention_flops) * u_flop
    weights = _bytes_read(spec, role, dtype, batch) / batch * u_byte
    core = max(attention_flops * u_flop, kv_bytes * u_byte)
    return HalfCost(card.name, core + rest, core + max(rest, weights))


def cheapest(
    spec: ModelSpec, role: Role, cards: Iterable[Card], dtype: DType, context: float, batch: float
) -> HalfCost:
    """On the card whose ideal cost is least."""
    return min((half_cost(spec, role, card, dtype, context, batch) for card in cards), key=lambda cost: cost.ideal)


def _bytes_read(spec: ModelSpec, role: Role, dtype: DType, batch: float) -> float:
    """Bytes of the weights that a batch needs: of routed experts, those that the gate picks for any of its tokens (each
    as likely as the others); of the embedding no more than a few rows, unless it is the LM head too."""
    whole = spec.weight_bytes(role, dtype)
    if role is Role.ATTENTION:
        return whole - (0 if spec.tied_head else spec.vocab * spec.hidden * dtype.itemsize)
    moe = spec.moe
    if moe is None:
        return whole
    experts = 3 * spec.hidden * len(moe.layers) * moe.experts * moe.intermediate * dtype.itemsize
    untouched = math.pow(1 - moe.top_k / moe.experts, batch)
    return whole - experts * untouched
