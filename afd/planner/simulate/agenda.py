"""The simulated clock: what is going to happen, in order of time."""

from __future__ import annotations

import gc
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

Action = Callable[[float, Any], None]  # told the time, and what it was put down with


class Agenda:
    """Times are seconds since the simulation began. Of things due at one moment, the first put down comes first: so a
    run is a function of its scenario alone."""

    __slots__ = ("_entries", "events", "now_s")

    def __init__(self) -> None:
        self._entries: list[tuple[float, int, Action, Any]] = []
        self.events = 0  # put down so far
        self.now_s = 0.0

    def at(self, at_s: float, action: Action, what: Any) -> None:
        """`at_s` is not in the past."""
        self.events += 1
        heappush(self._entries, (at_s, self.events, action, what))

    def clock(self) -> float:
        """What time it is."""
        return self.now_s

    def run(self) -> None:
        """Until nothing is left to happen."""
        entries, collects = self._entries, gc.isenabled()
        gc.disable()  # what is cyclic here lives to the end anyway
        try:
            while entries:
                now_s, _, action, what = heappop(entries)
                self.now_s = now_s
                action(now_s, what)
        finally:
            if collects:
                gc.enable()
