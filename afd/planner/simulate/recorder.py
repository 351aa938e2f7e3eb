"""The simulated workers' timelines: the live ones' marks, so that the live ones' analysis reads them."""

from __future__ import annotations

from collections.abc import Callable

from afd.pipeline.timeline import Activity, Event, Recording, Timelines, pack
from afd.types import Role

# Marks of all workers together: some steps of a large cluster, and a few seconds' work for the analysis.
MOST_MARKS = 60_000


class Marks:
    """One worker's. It asks whether the recorder is `on` before it makes a mark. `resting`: what it does while it waits
    for something to happen, None while it works; kept up by the worker, recorded or not."""

    __slots__ = ("_events", "_recorder", "rank", "resting", "role")

    def __init__(self, recorder: Recorder, role: Role, rank: int) -> None:
        self._recorder = recorder
        self._events: list[Event] = []
        self.role = role
        self.rank = rank
        self.resting: Activity | None = Activity.IDLE

    def mark(
        self,
        at_s: float,
        activity: Activity,
        microbatch: int = 0,
        step: int = 0,
        layer: int = 0,
        tokens: int = 0,
        wire_bytes: int = 0,
        peer: int = 0,
    ) -> None:
        """From `at_s` on the worker does `activity` (see Event). In order of time; it may be ahead of the clock."""
        self._events.append(Event(round(at_s * 1e9), step, tokens, wire_bytes, microbatch, layer, peer, activity))
        self._recorder.count()

    def recording(self, until_s: float) -> Recording:
        now_ns = round(until_s * 1e9)
        return Recording(self.role, self.rank, 0, now_ns, pack(e for e in self._events if e.at_ns <= now_ns))


class Recorder:
    """Records all workers from `begin` on, until `most` marks are made. `clock` says what time it is."""

    def __init__(self, clock: Callable[[], float], most: int = MOST_MARKS) -> None:
        self.on = False
        self._begun = False
        self._clock = clock
        self._left = most
        self._until_s: float | None = None
        self._workers: list[Marks] = []

    def worker(self, role: Role, rank: int) -> Marks:
        marks = Marks(self, role, rank)
        self._workers.append(marks)
        return marks

    def begin(self) -> None:
        """Once; whoever waits is recorded from now on, whoever works from its next mark on."""
        if self._begun:
            return
        self._begun = self.on = True
        for worker in self._workers:
            if worker.resting is not None:
                worker.mark(self._clock(), worker.resting)

    def count(self) -> None:
        """A mark was made."""
        self._left -= 1
        if self._left <= 0 and self.on:
            self.end()

    def end(self) -> None:
        """Nothing after now is recorded."""
        self.on = False
        self._until_s = self._clock()

    def timelines(self) -> Timelines:
        until_s = self._clock() if self._until_s is None else self._until_s
        return Timelines(tuple(worker.recording(until_s) for worker in self._workers))
