"""What each worker's hardware costs: the value of --prices."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from afd.errors import ConfigError
from afd.planner.hardware import CARDS, Card
from afd.types import Role

TOTAL = "total"
_KEY = re.compile(r"(attention|ffn)(?:_rank:(\d+))?")


class Worker(NamedTuple):
    """One worker of a cluster; `rank` is an attention_rank or an ffn_rank, by role."""

    role: str
    rank: int

    def __str__(self) -> str:
        return f"{self.role}_rank:{self.rank}"


@dataclass(frozen=True, slots=True)
class Price:
    """USD per hour; `card` where it was given as one's name."""

    usd_per_hour: float
    card: Card | None = None


@dataclass(frozen=True, slots=True)
class Prices:
    """By role, by worker (which goes before its role), or of the whole server."""

    by_name: Mapping[str, Price]

    @staticmethod
    def parse(text: str) -> Prices:
        """`attention=0.8,ffn=H800`, `attention_rank:0=0.8`, `total=4`. Raises ConfigError."""
        found: dict[str, Price] = {}
        for part in text.split(","):
            name, _, value = (side.strip() for side in part.partition("="))
            if name in found or not (name == TOTAL or _KEY.fullmatch(name)):
                raise ConfigError(
                    f"--prices holds {part!r}; names are attention, ffn, attention_rank:N, ffn_rank:N or total, each "
                    "at most once, like attention=0.8,ffn=2.0 (USD per hour) or attention=H20,ffn=H800"
                )
            found[name] = _price(value, part)
        if TOTAL in found and len(found) > 1:
            raise ConfigError(f"--prices is {text!r}; total is the whole server's price, and stands alone")
        return Prices(found)

    @property
    def total(self) -> Price | None:
        """The whole server's, where it was given so."""
        return self.by_name.get(TOTAL)

    def of(self, workers: Collection[Worker]) -> dict[Worker, Price]:
        """Each worker's. Raises ConfigError naming a worker without a price, or a price without a worker."""
        priced = {worker: self.by_name.get(str(worker)) or self.by_name.get(worker.role) for worker in workers}
        for worker, price in priced.items():
            if price is None:
                raise ConfigError(f"--prices says nothing about {worker}; add {worker.role}=… or {worker}=…")
        unused = set(self.by_name) - {str(worker) for worker in workers} - {role.value for role in Role}
        if unused:
            raise ConfigError(
                f"--prices names {min(unused)}, which this server does not have; it has {', '.join(map(str, workers))}"
            )
        return {worker: price for worker, price in priced.items() if price is not None}


def _price(value: str, part: str) -> Price:
    if card := CARDS.get(value.upper()):
        return Price(card.usd_per_hour, card)
    try:
        price = Price(float(value))
    except ValueError:
        price = Price(math.nan)
    if not 0 <= price.usd_per_hour < math.inf:
        raise ConfigError(
            f"--prices holds {part!r}; a price is a number of USD per hour, or a card with a list price: "
            f"{', '.join(CARDS)}"
        )
    return price
