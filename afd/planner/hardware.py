"""Accelerators: what an hour of one costs, and what it does in a second.

Source: Step-3 report (arXiv 2507.19427), table 4: public cloud prices, dense peak rates.
"""

from __future__ import annotations

from dataclasses import dataclass

from afd.types import DType


@dataclass(frozen=True, slots=True)
class Card:
    """Rates are peaks. fp8_flops None: it computes FP8 at its BF16 rate."""

    name: str
    usd_per_hour: float
    bf16_flops: float  # per second
    fp8_flops: float | None
    memory_bandwidth: float  # bytes per second

    def flops(self, dtype: DType) -> float:
        """FLOP/s in `dtype` (16 bits where it is wider)."""
        return (self.fp8_flops if dtype is DType.FP8 else None) or self.bf16_flops

    def usd_per_flop(self, dtype: DType) -> float:
        return self.usd_per_hour / 3600 / self.flops(dtype)

    @property
    def usd_per_byte(self) -> float:
        """Of memory read."""
        return self.usd_per_hour / 3600 / self.memory_bandwidth


CARDS = {
    card.name: card
    for card in (
        Card("H800", 2.00, 989e12, 1980e12, 3.35e12),
        Card("H20", 0.80, 148e12, 296e12, 4.0e12),
        Card("A800", 0.75, 312e12, None, 2.0e12),
        Card("910B", 0.67, 280e12, None, 1.6e12),
    )
}
