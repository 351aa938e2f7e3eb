"""Messages between workers: each worker has one way out and one way in, and messages queue for both."""

from __future__ import annotations

from afd.planner.simulate.clock import Link


class Door:
    """One worker's end of the network. A message leaves when those before it have left, and comes in when those before
    it are in; the bytes flow through, so a message costs its length once, not once at each end."""

    __slots__ = ("_in_free_s", "_latency_s", "_out_free_s", "_s_per_byte")

    def __init__(self, link: Link) -> None:
        self._s_per_byte = 1 / link.bytes_per_s
        self._latency_s = link.latency_s
        self._out_free_s = self._in_free_s = 0.0

    def send(self, to: Door, num_bytes: int, now_s: float, delay_s: float = 0.0) -> float:
        """When `num_bytes` sent now are there; they are held up by `delay_s` on the way, and the next ones are not.
        Calls come in order of time."""
        begin_s = self._out_free_s
        if begin_s < now_s:
            begin_s = now_s
        self._out_free_s = left_s = begin_s + num_bytes * self._s_per_byte
        begin_s += self._latency_s
        if begin_s < to._in_free_s:
            begin_s = to._in_free_s
        there_s = begin_s + num_bytes * to._s_per_byte
        if there_s < left_s + self._latency_s:
            there_s = left_s + self._latency_s
        to._in_free_s = there_s
        return there_s + delay_s
