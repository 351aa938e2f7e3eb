"""Timelines written by hand: what happened when, in us, on clocks that may differ."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from afd.pipeline.timeline import Activity, Experts, Recording, Timelines
from afd.types import Role

A, F = Role.ATTENTION, Role.FFN


@dataclass
class Hand:
    """One worker's timeline. `at` times are true; the worker's own clock is `behind_us` behind."""

    role: Role
    rank: int = 0
    behind_us: int = 0
    known: bool = True  # whether the collector found out how far it is behind
    events: list[bytes] = field(default_factory=list)
    experts: list[Experts] = field(default_factory=list)

    def mark(
        self, at_us: int, activity: Activity, microbatch: int = 0, step: int = 0, layer: int = 0, **more: int
    ) -> Hand:
        at_ns = (at_us - self.behind_us) * 1000
        tokens, wire_bytes, peer = (more.get(name, 0) for name in ("tokens", "wire_bytes", "peer"))
        packed = struct.pack("<qQIIHHHBx", at_ns, step, tokens, wire_bytes, microbatch, layer, peer, activity)
        self.events.append(packed)
        return self

    def until(self, at_us: int) -> Recording:
        offset_ns = self.behind_us * 1000 if self.known else 0
        now_ns = (at_us - self.behind_us) * 1000
        return Recording(self.role, self.rank, 1, now_ns, b"".join(self.events), tuple(self.experts), offset_ns, 7)


def one_layer(behind_us: int = 0, known: bool = True) -> Timelines:
    """1A1F for one millisecond from 0: one dispatch of 10 tokens, computed after a gather, answered, combined.

    attention  0 schedule 100 attention 200 dispatch 250 other 260 wait        700 collect 720 combine 750 idle 1000
    FFN        0 idle                            300 receive 310 other 320 gather 400 ffn 600 combine 630 idle 1000
    """
    attention = (
        Hand(A)
        .mark(0, Activity.SCHEDULE)
        .mark(100, Activity.ATTENTION, tokens=10)
        .mark(200, Activity.DISPATCH, tokens=10)
        .mark(250, Activity.OTHER)
        .mark(260, Activity.WAIT)
        .mark(700, Activity.COLLECT, tokens=10, wire_bytes=500)
        .mark(720, Activity.COMBINE)
        .mark(750, Activity.IDLE)
    )
    ffn = (
        Hand(F, 0, behind_us, known)
        .mark(0, Activity.IDLE)
        .mark(300, Activity.RECEIVE, tokens=10, wire_bytes=1000)
        .mark(310, Activity.OTHER)
        .mark(320, Activity.GATHER)
        .mark(400, Activity.FFN, tokens=10)
        .mark(600, Activity.COMBINE, tokens=10)
        .mark(630, Activity.IDLE)
    )
    ffn.experts.append(Experts((600 - behind_us) * 1000, 4, 20))
    return Timelines((attention.until(1000), ffn.until(1000)))
