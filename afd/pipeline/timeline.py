"""Where a worker's time goes: every worker marks what its thread turns to, always, in a ring of fixed size.

One thread owns a timeline (the engine's, the FFN loop's). A mark says "from now on I do this" and ends what came
before, so the spans follow one another without a gap and add up to the wall time exactly. Any thread may read.

What lies between workers (wire, queue, gather wait) is nobody's span: afd.pipeline.analysis derives it from both ends.
"""

from __future__ import annotations

import os
import struct
import time
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from itertools import starmap
from typing import NamedTuple

from afd.types import ActivityTotals, HistogramTotals, Role, WorkerTotals

# Marks a ring holds: 5 to 10 s of a busy worker, who makes 6 marks a layer. They take 13 MB from the start.
CAPACITY = 1 << 16

STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
CALL_TOKENS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0)

EXPERTS_EVERY = 61  # calls of experts between two whose experts are counted; no divisor of a usual number of layers

_EVENT = struct.Struct("<qQIIHHHBx")  # as Event
_Mark = tuple[int, int, int, int, int, int, int, int]  # as Event, which takes five times as long to make
_EXPERTS = 1024  # counted calls that are kept
_CHUNK = 2048  # events copied at once: the owner may wait that long for the interpreter, half a millisecond


class Activity(IntEnum):
    """What a worker's thread does."""

    OTHER = 0  # what is between the others: notes of other threads, publishing tokens, choosing
    IDLE = 1  # there is nothing to do
    WAIT = 2  # attention: for the FFN side's answers
    SCHEDULE = 3  # picks a step's requests, describes their KV blocks, embeds their tokens
    ATTENTION = 4  # one layer's attention half
    DISPATCH = 5  # writes one to every FFN worker
    COLLECT = 6  # takes an answer off the port
    COMBINE = 7  # attention: adds the partial sums to the residual; FFN: writes an answer
    HEAD = 8  # final norm and LM head
    SAMPLE = 9  # draws the tokens, and tells them to their requests
    RECEIVE = 10  # FFN: takes a dispatch off the port
    GATHER = 11  # FFN: has work, but waits for other workers' dispatches of the same layer
    FFN = 12  # one layer for all dispatches gathered

    @property
    def label(self) -> str:
        """The name for people and metrics."""
        return self.name.lower()


WAITING = frozenset({Activity.IDLE, Activity.WAIT, Activity.GATHER})


class Event(NamedTuple):
    """One mark. microbatch, step, layer and peer name the dispatch it is about, where it is about one: `peer` is the
    other side's rank (a DISPATCH goes to all, peer 0; an FFN is about the COMBINEs right behind it)."""

    at_ns: int  # CLOCK_MONOTONIC of its host
    step: int
    tokens: int
    wire_bytes: int  # of the tensors that a COLLECT or RECEIVE takes off the wire
    microbatch: int
    layer: int
    peer: int
    activity: int


class Experts(NamedTuple):
    """One call of experts that was looked at: how many had tokens, and how many tokens they had (a token counts once
    for each of its experts)."""

    at_ns: int
    calls: int
    tokens: int


def pack(events: Iterable[Event]) -> bytes:
    """As a Recording has them; `events` oldest first."""
    return b"".join(starmap(_EVENT.pack, events))


@dataclass(frozen=True, slots=True)
class Recording:
    """The newest part of one worker's timeline, as it travels. Add `offset_ns` to its times to have the reader's
    clock, right to `uncertainty_ns`."""

    role: Role
    rank: int  # attention_rank or ffn_rank, by role
    pid: int
    now_ns: int  # when it was read: the end of its last span
    packed: bytes  # events, oldest first
    experts: tuple[Experts, ...] = ()
    offset_ns: int = 0
    uncertainty_ns: int = 0

    def events(self) -> Iterator[Event]:
        """Oldest first. The first one began before the time asked for, unless the ring did not hold that any more."""
        return map(Event._make, _EVENT.iter_unpack(self.packed))


@dataclass(frozen=True, slots=True)
class Timelines:
    """What a cluster's workers recorded, on the clock of who collected it; `missing` are sentences on those that did
    not say."""

    recordings: tuple[Recording, ...]
    missing: tuple[str, ...] = ()


class Histogram:
    """Counts of values by size. One thread observes; any may read."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def totals(self) -> HistogramTotals:
        return HistogramTotals(self._bounds, tuple(self._counts), self._sum)


class _Total:
    __slots__ = ("calls", "ns", "tokens", "wire_bytes")

    def __init__(self) -> None:
        self.ns = self.calls = self.tokens = self.wire_bytes = 0


class Timeline:
    """One worker's. It begins when it is built, with OTHER. `work`: see WorkerTotals."""

    def __init__(self, role: Role, rank: int, capacity: int = CAPACITY) -> None:
        assert capacity & (capacity - 1) == 0, f"a ring of {capacity} marks: not a power of two"
        self.role = role
        self.rank = rank
        self.work = Histogram(STEP_SECONDS if role is Role.ATTENTION else CALL_TOKENS)
        self._capacity = capacity
        # Distinct tuples of distinct large numbers: the memory is taken now, and does not grow while the ring fills.
        self._ring = [(i << 40, 0, 0, i << 20, 0, 0, 0, 0) for i in range(capacity)]
        self._marks = 0  # so far; mark i is at i modulo the capacity
        self._totals = [_Total() for _ in Activity]
        self._current = self._totals[Activity.OTHER]
        self._since_ns = time.monotonic_ns()
        self._experts: deque[Experts] = deque(maxlen=_EXPERTS)
        self._sums = (0, 0)  # of all Experts ever: calls, tokens
        self.mark(Activity.OTHER)

    def mark(
        self,
        activity: Activity,
        microbatch: int = 0,
        step: int = 0,
        layer: int = 0,
        tokens: int = 0,
        wire_bytes: int = 0,
        peer: int = 0,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> int:
        """From now on the owner's thread does `activity` (see Event). Returns now, in ns. Owner only; half a
        microsecond, with cold caches one or two, which is why it is one function, and the clock a local name."""
        now_ns = clock()
        marks = self._marks
        self._ring[marks & (self._capacity - 1)] = (now_ns, step, tokens, wire_bytes, microbatch, layer, peer, activity)
        self._marks = marks + 1  # after the store: a reader never sees a mark that is not there
        self._current.ns += now_ns - self._since_ns
        self._since_ns = now_ns
        self._current = total = self._totals[activity]
        total.calls += 1
        total.tokens += tokens
        total.wire_bytes += wire_bytes
        return now_ns

    def count_experts(self, calls: int, tokens: int) -> None:
        """One of every EXPERTS_EVERY calls of experts, looked at: see Experts. Owner only."""
        self._experts.append(Experts(time.monotonic_ns(), calls, tokens))
        self._sums = (self._sums[0] + calls, self._sums[1] + tokens)

    def totals(self) -> WorkerTotals:
        """Since the beginning, without what goes on now. Any thread."""
        activities = {
            a.label: ActivityTotals(t.ns / 1e9, t.calls, t.tokens, t.wire_bytes)
            for a, t in zip(Activity, self._totals, strict=True)
            if t.calls
        }
        return WorkerTotals(activities, self.work.totals(), *self._sums)

    def since(self, since_ns: int, max_events: int) -> Recording:
        """The newest events: those from `since_ns` on (this host's CLOCK_MONOTONIC) and the one that went on then, at
        most `max_events` and less where the ring holds less. Any thread; takes no lock, and what the owner overwrites
        meanwhile is left out. 0 events: only what time it is here."""
        now_ns, first = self._now()
        oldest = max(0, first - min(max_events, self._capacity))
        chunks: list[list[_Mark]] = []
        while first > oldest and (not chunks or chunks[-1][0][0] > since_ns):
            begin = max(oldest, first - _CHUNK)
            chunks.append(self._slice(begin, first))
            first = begin
        events = [event for chunk in reversed(chunks) for event in chunk]
        # The owner may be writing one mark more than it has counted.
        del events[: max(0, self._marks + 1 - self._capacity - first)]
        del events[: max(0, bisect_right(events, since_ns, key=lambda event: event[0]) - 1)]
        packed = b"".join(b"".join(starmap(_EVENT.pack, events[i : i + _CHUNK])) for i in range(0, len(events), _CHUNK))
        experts = tuple(e for e in self._experts.copy() if e.at_ns >= since_ns) if max_events else ()
        return Recording(self.role, self.rank, os.getpid(), now_ns, packed, experts)

    def _now(self) -> tuple[int, int]:
        """The time, and the marks made until then."""
        while True:
            marks = self._marks
            now_ns = time.monotonic_ns()
            if marks == self._marks:
                return now_ns, marks

    def _slice(self, begin: int, end: int) -> list[_Mark]:
        """Marks begin … end - 1, in one step of the interpreter where they do not go round the ring's end."""
        i = begin & (self._capacity - 1)
        j = i + end - begin
        return self._ring[i:j] + self._ring[: max(0, j - self._capacity)]
