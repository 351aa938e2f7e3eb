"""Finds the highest rate that meets the objectives: doubles or halves until it is between two rates, then bisects."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

PRECISION = 1.05  # the answer is at most this factor below a rate that does not meet the objectives
MOST_STEPS = 12  # doublings or halvings from the first rate


@dataclass(frozen=True, slots=True)
class Probe:
    """One rate that was tried. `share`: of its requests, those that met the objectives."""

    rate: float
    share: float
    met: bool


@dataclass(frozen=True, slots=True)
class Found:
    """`rate` None: none that was tried meets them. `bounded`: a higher one was tried and does not."""

    rate: float | None
    bounded: bool
    probes: tuple[Probe, ...]


async def highest(probe: Callable[[float], Awaitable[Probe]], first: float, precision: float = PRECISION) -> Found:
    """Tries rates one after the other, from `first` on."""
    probes: list[Probe] = []

    async def met(rate: float) -> bool:
        probes.append(await probe(rate))
        return probes[-1].met

    low, high = await _between(met, first)
    while low is not None and high is not None and high > precision * low:
        middle = (low * high) ** 0.5
        if await met(middle):
            low = middle
        else:
            high = middle
    return Found(low, high is not None, tuple(probes))


async def _between(met: Callable[[float], Awaitable[bool]], first: float) -> tuple[float | None, float | None]:
    """A rate that meets the objectives and, twice as high, one that does not; None for what was not found."""
    rate = first
    if await met(rate):
        for _ in range(MOST_STEPS):
            if not await met(2 * rate):
                return rate, 2 * rate
            rate *= 2
        return rate, None
    for _ in range(MOST_STEPS):
        rate /= 2
        if await met(rate):
            return rate, 2 * rate
    return None, rate
