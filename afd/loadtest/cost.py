"""What output tokens cost: the workers' price while they computed and while they waited, beside the least possible.

Measured is everything the server does in the window, prompts included; in theory only decoding costs anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from afd.loadtest.prices import Price, Prices, Worker
from afd.planner import cost as planner
from afd.planner.hardware import CARDS
from afd.spec import ModelSpec
from afd.types import DType, Role

_PER = 1e6  # tokens


@dataclass(frozen=True, slots=True)
class Theory:
    """USD per million output tokens of one half on `card`; see afd.planner.cost."""

    role: str
    card: str
    ideal: float
    at_batch: float


@dataclass(frozen=True, slots=True)
class Cost:
    """USD per million output tokens. `attention` and `ffn`: while those workers computed; `idle`: while any waited, for
    the other side or for requests. All three None, and `note` says why, where only the total is known."""

    usd_per_hour: float
    total: float
    attention: float | None = None
    ffn: float | None = None
    idle: float | None = None
    theory: tuple[Theory, ...] = ()
    theory_ideal: float | None = None
    theory_at_batch: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Served:
    """The model as it ran: in theory it computes in `dtype`, a decoded token sees `context` tokens, and `batch`
    requests are decoded at a time."""

    spec: ModelSpec
    dtype: DType
    context: float
    batch: float


def whole(price: Price, tokens_per_s: float, note: str) -> Cost:
    """Where only the server's price is known."""
    return Cost(price.usd_per_hour, _per_million(price.usd_per_hour, tokens_per_s), note=note)


def split(
    prices: Prices, busy: Mapping[Worker, float], tokens_per_s: float, served: Served | None, note: str = ""
) -> Cost:
    """`busy`: each worker's share of the window. Raises ConfigError for a worker without a price."""
    priced = prices.of(busy)
    usd_per_hour = sum(price.usd_per_hour for price in priced.values())
    spent = {
        role: sum(price.usd_per_hour * busy[w] for w, price in priced.items() if w.role == role.value) for role in Role
    }
    theory = tuple(_theory(role, priced, served) for role in Role) if served else ()
    return Cost(
        usd_per_hour,
        _per_million(usd_per_hour, tokens_per_s),
        attention=_per_million(spent[Role.ATTENTION], tokens_per_s),
        ffn=_per_million(spent[Role.FFN], tokens_per_s),
        idle=_per_million(usd_per_hour - sum(spent.values()), tokens_per_s),
        theory=theory,
        theory_ideal=sum(part.ideal for part in theory) if theory else None,
        theory_at_batch=sum(part.at_batch for part in theory) if theory else None,
        note=note,
    )


def _theory(role: Role, priced: Mapping[Worker, Price], served: Served) -> Theory:
    """On the role's card where its price was given as one; else on the listed card that is cheapest for the half."""
    workers = [price for worker, price in priced.items() if worker.role == role.value]
    cards = [price.card for price in workers if price.card] or list(CARDS.values())
    # Attention workers divide the requests; the FFN side may join them all.
    batch = served.batch / len(workers) if role is Role.ATTENTION and workers else served.batch
    half = planner.cheapest(served.spec, role, cards, served.dtype, served.context, max(1.0, batch))
    return Theory(role.value, half.card, _PER * half.ideal, _PER * half.at_batch)


def _per_million(usd_per_hour: float, tokens_per_s: float) -> float:
    return usd_per_hour / 3600 / tokens_per_s * _PER if tokens_per_s > 0 else float("inf")
