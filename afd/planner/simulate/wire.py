"""Messages between workers: each worker has one outlet and one inlet, at which messages queue (afd.planner.stages)."""

from __future__ import annotations


class Door:
    """One worker's end of the network. A message leaves behind those before it, and comes in behind those before it;
    it flows through, so it takes its length once, not once at each end."""

    __slots__ = ("_in_free_s", "_latency_s", "_out_free_s")

    def __init__(self, latency_s: float) -> None:
        self._latency_s = latency_s
        self._out_free_s = self._in_free_s = 0.0

    def send(self, to: Door, takes_s: float, now_s: float) -> float:
        """When a message sent now is there that keeps both ends busy for `takes_s`. Calls come in order of time."""
        begin_s = self._out_free_s
        if begin_s < now_s:
            begin_s = now_s
        self._out_free_s = begin_s + takes_s
        begin_s += self._latency_s
        if begin_s < to._in_free_s:
            begin_s = to._in_free_s
        to._in_free_s = there_s = begin_s + takes_s
        return there_s
