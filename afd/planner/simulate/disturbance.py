"""Jitter and stragglers: how much longer than it should a thing takes.

A draw belongs to what it is drawn for (worker, microbatch, step, layer), not to the order in which things happen: two
runs that differ in one setting meet the same luck, so their difference is the setting's.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

_DRAWS = 1 << 16


def luck(seed: int) -> Sequence[float]:
    """Draws from the exponential distribution of mean 1, for all workers."""
    draw = random.Random(f"jitter {seed}")
    return [draw.expovariate(1.0) for _ in range(_DRAWS)]


class Disturbance:
    """One worker's: it is `slow` times slower, and each thing takes 1 + `jitter` · e times as long, e one of `luck`. So
    more jitter makes each single thing longer, never shorter."""

    __slots__ = ("_jitter", "_luck", "_offset", "_slow")

    def __init__(self, luck: Sequence[float], worker: int, jitter: float, slow: float) -> None:
        self._luck = luck
        self._offset = worker * 40503
        self._jitter = jitter
        self._slow = slow

    def factor(self, microbatch: int, step: int, layer: int) -> float:
        """Of what this worker does about a dispatch."""
        if not self._jitter:
            return self._slow
        where = self._offset + microbatch * 24593 + step * 12289 + layer * 6151
        return self._slow * (1 + self._jitter * self._luck[where & (_DRAWS - 1)])
