"""`afd cost` as a value: everything that the report's formulas say of one model at one context on some cards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from afd.planner.cost import attention_usd, ffn_usd, ideal_ffn_batch, minimum_sparsity
from afd.planner.hardware import Card
from afd.planner.models import Planned

_PER = 1e6  # tokens


class Halves(TypedDict):
    """USD per million tokens on one card."""

    attention: float
    ffn: float


class Best(TypedDict):
    """The cheapest card for each half."""

    attention_card: str
    ffn_card: str
    usd_per_1m: float


class CostJson(TypedDict):
    """What `afd cost --json` prints."""

    kv_bytes: float
    attention_flops: int
    linear_flops: int
    ffn_flops: int
    usd_per_1m: dict[str, Halves]
    best: Best
    minimum_sparsity: dict[str, float]


@dataclass(frozen=True, slots=True)
class DecodeCost:
    """Bytes and FLOPs of one decoded token at `context`, and USD per million tokens by card."""

    model: Planned
    context: int
    cards: Mapping[str, Card]
    attention_usd: Mapping[str, float]
    ffn_usd: Mapping[str, float]

    @property
    def attention_card(self) -> str:
        return min(self.attention_usd, key=lambda name: self.attention_usd[name])

    @property
    def ffn_card(self) -> str:
        return min(self.ffn_usd, key=lambda name: self.ffn_usd[name])

    @property
    def afd_usd(self) -> float:
        """Each half on its cheapest card."""
        return self.attention_usd[self.attention_card] + self.ffn_usd[self.ffn_card]

    def colocated_usd(self, card: str) -> float:
        """Both halves on one card, each still at its best: what splitting over unlike cards is compared with. Batches
        that differ between the halves, which splitting allows too, are not in these formulas."""
        return self.attention_usd[card] + self.ffn_usd[card]

    @property
    def colocated_card(self) -> str:
        return min(self.cards, key=self.colocated_usd)

    @property
    def intensity(self) -> float:
        """FLOPs of attention per byte of KV read; the same at every batch and nearly every context (section 5.1)."""
        return self.model.spec.attention_flops_per_token(self.context) / self.model.kv_bytes(self.context)

    def ideal_ffn_batch(self, card: str) -> float:
        return ideal_ffn_batch(self.model, self.cards[card])

    def minimum_sparsity(self, card: str) -> float:
        return minimum_sparsity(self.model, self.cards[card])

    def as_json(self) -> CostJson:
        spec = self.model.spec
        return {
            "kv_bytes": self.model.kv_bytes(self.context),
            "attention_flops": spec.attention_flops_per_token(self.context),
            "linear_flops": spec.linear_flops_per_token,
            "ffn_flops": spec.ffn_flops_per_token,
            "usd_per_1m": {
                name: {"attention": self.attention_usd[name], "ffn": self.ffn_usd[name]} for name in self.cards
            },
            "best": {
                "attention_card": self.attention_card,
                "ffn_card": self.ffn_card,
                "usd_per_1m": self.afd_usd,
            },
            "minimum_sparsity": {name: self.minimum_sparsity(name) for name in self.cards},
        }


def decode_cost(model: Planned, context: int, cards: Sequence[Card]) -> DecodeCost:
    """By the formulas of section 4.2. `cards`: at least one."""
    by_name = {card.name: card for card in cards}
    return DecodeCost(
        model,
        context,
        by_name,
        {name: _PER * attention_usd(model, card, context) for name, card in by_name.items()},
        {name: _PER * ffn_usd(model, card) for name, card in by_name.items()},
    )
