"""When requests are sent: gaps of mean 1 from one distribution, laid over a rate that is constant or climbs.

With Λ(t) requests due until t, the n-th is sent where Λ reaches the sum of n gaps; so every kind of gap works with
every rate. Seconds and requests per second throughout; each iterator is a function of its seed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from afd.errors import ConfigError

KINDS = ("constant", "poisson", "gamma")


@dataclass(frozen=True, slots=True)
class Ramp:
    """The rate climbs (or falls) in a line from one value to the other, and then it is over."""

    from_rate: float
    to_rate: float
    seconds: float

    @staticmethod
    def parse(text: str) -> Ramp:
        """FROM:TO:SECONDS. Raises ConfigError."""
        try:
            ramp = Ramp(*map(float, text.split(":")))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"--ramp is {text!r}; it is FROM:TO:SECONDS, like 1:20:60") from error
        rates = (ramp.from_rate, ramp.to_rate)
        if not (all(0 <= rate < math.inf for rate in rates) and max(rates) > 0 and 0 < ramp.seconds < math.inf):
            raise ConfigError(f"--ramp is {text!r}; rates are 0 or more, one of them above 0, and SECONDS above 0")
        return ramp


def steady(rate: float, kind: str, burstiness: float, seed: int) -> Iterator[float]:
    """Times of requests at `rate` per second, for ever. Raises ConfigError for what cannot be."""
    if not 0 < rate < math.inf:
        raise ConfigError(f"--rate is {rate:g}; it must be above 0 (requests per second)")
    return (total / rate for total in _sums(kind, burstiness, seed))


def climbing(ramp: Ramp, kind: str, burstiness: float, seed: int) -> Iterator[float]:
    """Times of requests while `ramp` lasts."""
    slope = (ramp.to_rate - ramp.from_rate) / ramp.seconds
    most = ramp.seconds * (ramp.from_rate + ramp.to_rate) / 2
    for total in _sums(kind, burstiness, seed):
        if total > most:
            return
        # The smaller root of slope/2·t² + from·t = total, written so that slope 0 needs no case of its own.
        yield 2 * total / (ramp.from_rate + math.sqrt(max(0.0, ramp.from_rate**2 + 2 * slope * total)))


def _sums(kind: str, burstiness: float, seed: int) -> Iterator[float]:
    """Running sums of gaps, the first one's included."""
    gap, total = _gaps(kind, burstiness, random.Random(seed)), 0.0

    def sums() -> Iterator[float]:
        nonlocal total
        while True:
            total += gap()
            yield total

    return sums()


def _gaps(kind: str, burstiness: float, rng: random.Random) -> Callable[[], float]:
    """gamma's shape is `burstiness`: 1 is poisson, below it requests come in bursts, above it more evenly."""
    if not 0 < burstiness < math.inf:
        raise ConfigError(f"--burstiness is {burstiness:g}; it must be above 0, and 1 is poisson")
    gaps: dict[str, Callable[[], float]] = {
        "constant": lambda: 1.0,
        "poisson": lambda: rng.expovariate(1.0),
        "gamma": lambda: rng.gammavariate(burstiness, 1.0 / burstiness),
    }
    if kind not in gaps:
        raise ConfigError(f"--arrivals is {kind!r}; known are {', '.join(KINDS)}")
    return gaps[kind]
