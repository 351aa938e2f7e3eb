"""The bounded queue: how many requests may wait for their first token, over all workers, and when to ask again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from afd.errors import QueueFull

_NEWEST = 0.1  # weight of the newest interval
_LONGEST_S = 60


class Admission:
    """Counts choices of this router that have no token yet. `most`: router.max_queue. Belongs to one event loop."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = most
        self.waiting = 0
        self._clock = clock
        self._interval_s = 0.0  # between two that stop waiting, about
        self._left_at: float | None = None  # when the last one did, while others went on waiting

    def check(self) -> None:
        """Raises QueueFull while as many wait as may."""
        if self.waiting >= self.most:
            message = f"{self.waiting} requests wait for their first token already (router.max_queue is {self.most})"
            raise QueueFull(message, retry_after_s=self.retry_after_s)

    def enter(self, count: int) -> None:
        """`count` more wait, all of one request: one may be longer than the queue has room. Raises QueueFull."""
        self.check()
        self.waiting += count

    def leave(self) -> None:
        """One waits no longer: it has a token."""
        now = self._clock()
        if self._left_at is not None:
            self._interval_s += _NEWEST * (now - self._left_at - self._interval_s)
        self._left_at = now
        self.give_up(1)

    def give_up(self, count: int) -> None:
        """`count` wait no longer, without a token: that says nothing of how fast the queue moves."""
        self.waiting -= count
        assert self.waiting >= 0, "more stopped waiting than came"
        if not self.waiting:
            self._left_at = None  # nor does an empty one

    @property
    def retry_after_s(self) -> int:
        """Whole seconds in which half of a full queue goes, at the pace of late: 1 to 60."""
        return min(_LONGEST_S, max(1, math.ceil(self._interval_s * self.most / 2)))
