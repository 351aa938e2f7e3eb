"""How many workers of each role there are, and which slice of the FFN each FFN rank owns."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from afd.errors import ConfigError
from afd.types import Cut

Sharding = Literal["ep", "tp", "hybrid"]


@dataclass(frozen=True, slots=True)
class Topology:
    """`attention` and `ffn` workers; written 2A1F."""

    attention: int
    ffn: int

    @classmethod
    def parse(cls, text: str) -> Topology:
        """Reads '2A1F'. Raises ConfigError for anything else, zero counts included."""
        match = re.fullmatch(r"\s*(\d+)\s*[aA]\s*(\d+)\s*[fF]\s*", text)
        if not match or "0" in (match[1].lstrip("0") or "0", match[2].lstrip("0") or "0"):
            raise ConfigError(
                f"topology {text!r} is not of the form <attention>A<ffn>F with both at least 1, like 2A1F"
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.attention}A{self.ffn}F"


@dataclass(frozen=True, slots=True)
class FfnShard:
    """The slice of every FFN layer that one ffn_rank owns: `ep` groups of whole experts, `tp` slices inside each.

    Rank r is in EP group r // tp and TP slice r % tp (report section 3: TP only, EP only, or a mix). Dense layers and
    shared experts have no experts to spread, so they are sliced over all ranks.
    """

    ffn_rank: int
    ep: int
    tp: int

    @property
    def size(self) -> int:
        return self.ep * self.tp

    @property
    def ep_rank(self) -> int:
        return self.ffn_rank // self.tp

    @property
    def tp_rank(self) -> int:
        return self.ffn_rank % self.tp

    def bounds(self, length: int, by: Literal["ep", "tp", "rank"]) -> tuple[int, int]:
        """First and one-past-last index that this rank owns of an axis of `length`; slices differ by one at most."""
        part, parts = {
            "ep": (self.ep_rank, self.ep),
            "tp": (self.tp_rank, self.tp),
            "rank": (self.ffn_rank, self.size),
        }[by]
        return length * part // parts, length * (part + 1) // parts

    def slices(self, shape: tuple[int, ...], cuts: tuple[Cut, ...]) -> tuple[slice, ...]:
        """The index of this rank's part of a tensor of `shape`."""
        index = [slice(0, n) for n in shape]
        for cut in cuts:
            index[cut.axis] = slice(*self.bounds(shape[cut.axis], cut.by))
        return tuple(index)


def ffn_shards(num_ffn: int, sharding: Sharding, num_experts: int, tp: int | None = None) -> tuple[FfnShard, ...]:
    """One shard per ffn_rank. Raises ConfigError when the experts or ranks do not divide.

    `tp` fixes the TP degree of "hybrid"; by default it is the largest divisor of num_ffn not above its square root.
    """
    if sharding == "ep":
        ep, tp_degree = num_ffn, 1
    elif sharding == "tp":
        ep, tp_degree = 1, num_ffn
    else:
        tp_degree = (
            tp if tp is not None else max(d for d in range(1, num_ffn + 1) if d * d <= num_ffn and num_ffn % d == 0)
        )
        if tp_degree < 1 or num_ffn % tp_degree:
            raise ConfigError(f"ffn.tp {tp_degree} does not divide the {num_ffn} FFN workers")
        if num_ffn > 1 and tp_degree in (1, num_ffn):
            raise ConfigError(
                f"hybrid sharding of {num_ffn} FFN workers needs an EP and a TP degree above 1; "
                f"use ffn.sharding ep or tp, or a number of workers like 4 or 6"
            )
        ep = num_ffn // tp_degree
    if num_experts and num_experts % ep:
        good = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
        raise ConfigError(
            f"{num_experts} experts do not divide over {ep} EP groups ({num_ffn} FFN workers, sharding {sharding}); "
            f"use ffn.sharding tp, or an EP degree out of {', '.join(map(str, good))}"
        )
    return tuple(FfnShard(r, ep, tp_degree) for r in range(num_ffn))
