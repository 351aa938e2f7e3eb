"""From the workers' timelines to the picture of the whole: spans on one clock, and each dispatch's way and back.

    written         taken      computing      computed           collected   resumed
       │    wire      │   queue     │    ffn     │    wire back    │  ready    │
       │              │ + gather    │            │                 │           │
    attention                     FFN worker                      attention worker
    worker

A dispatch is known on both sides by (attention_rank, microbatch, step, layer). Where clocks are not quite right, a
moment that would come before the one it follows is taken to be equal to it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from afd.errors import Unavailable
from afd.pipeline.timeline import Activity, Experts, Recording, Timelines
from afd.types import Role


class Span(NamedTuple):
    """What one thread did from one mark to the next; times in ns on the collector's clock, the rest as in Event."""

    start_ns: int
    end_ns: int
    activity: Activity
    microbatch: int
    step: int
    layer: int
    peer: int
    tokens: int
    wire_bytes: int


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker's spans, oldest first, without gaps."""

    role: Role
    rank: int
    pid: int
    uncertainty_ns: int
    spans: list[Span]
    experts: list[Experts]  # on the collector's clock

    @property
    def name(self) -> str:
        return f"{self.role.value}_rank {self.rank}"


class Phase(NamedTuple):
    """A part of a dispatch's way."""

    name: str  # wire, queue, gather, ffn, wire back or ready
    start_ns: int
    end_ns: int


class Key(NamedTuple):
    """A dispatch's name on both sides."""

    attention_rank: int
    microbatch: int
    step: int
    layer: int


class Journey(NamedTuple):
    """A dispatch's way to one FFN worker and back. `gathering_ns`: how much of its time there, before it was computed,
    the FFN worker waited for others' dispatches."""

    key: Key
    ffn_rank: int
    dispatch: Span
    taken_ns: int
    gathering_ns: int
    compute: Span
    collected_ns: int
    combine: Span

    def phases(self) -> list[Phase]:
        """From written to resumed, without gaps."""
        waited_ns = self.compute.start_ns - self.gathering_ns
        ends = (self.taken_ns, waited_ns, self.compute.start_ns, self.compute.end_ns, self.collected_ns)
        names = ("wire", "queue", "gather", "ffn", "wire back", "ready")
        phases, at_ns, last_ns = [], self.dispatch.end_ns, max(self.dispatch.end_ns, self.combine.start_ns)
        for name, end_ns in zip(names, (*ends, last_ns), strict=True):
            end_ns = min(max(end_ns, at_ns), last_ns)
            phases.append(Phase(name, at_ns, end_ns))
            at_ns = end_ns
        return phases


@dataclass(frozen=True, slots=True)
class Picture:
    """All workers over one window, which every one of them covers: as much of what was asked for as all rings hold.
    Spans reach over the window's ends; `clipped` cuts them."""

    asked_s: float
    start_ns: int
    end_ns: int
    workers: list[Worker]
    journeys: list[Journey]
    missing: tuple[str, ...]

    @property
    def window_s(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9

    def of(self, role: Role) -> list[Worker]:
        return [worker for worker in self.workers if worker.role is role]

    def clipped(self, worker: Worker) -> Iterator[Span]:
        """The worker's spans inside the window: they add up to it exactly."""
        for span in worker.spans:
            if span.end_ns > self.start_ns and span.start_ns < self.end_ns:
                yield span._replace(start_ns=max(span.start_ns, self.start_ns), end_ns=min(span.end_ns, self.end_ns))

    def holds(self, *spans: Span) -> bool:
        """Whether all of them lie inside the window as a whole."""
        return all(self.start_ns <= span.start_ns and span.end_ns <= self.end_ns for span in spans)


def picture(timelines: Timelines, asked_s: float) -> Picture:
    """Raises Unavailable when no worker has a timeline, or they have no moment in common."""
    workers = sorted((_worker(r) for r in timelines.recordings if r.packed), key=lambda w: (w.role.value, w.rank))
    if not workers:
        raise Unavailable(
            f"no worker has a timeline yet{': ' if timelines.missing else ''}{'; '.join(timelines.missing)}"
        )
    end_ns = min(worker.spans[-1].end_ns for worker in workers)
    start_ns = max(end_ns - int(asked_s * 1e9), *(worker.spans[0].start_ns for worker in workers))
    if start_ns >= end_ns:
        raise Unavailable("the workers' timelines have no moment in common; one of them has only just begun")
    return Picture(asked_s, start_ns, end_ns, workers, _journeys(workers), timelines.missing)


def _worker(recording: Recording) -> Worker:
    offset_ns, events = recording.offset_ns, list(recording.events())
    ends = [event.at_ns for event in events[1:]] + [recording.now_ns]
    activities = list(Activity)
    spans = [
        Span(
            e.at_ns + offset_ns,
            end + offset_ns,
            activities[e.activity],
            *(e.microbatch, e.step, e.layer, e.peer),
            *(e.tokens, e.wire_bytes),
        )
        for e, end in zip(events, ends, strict=True)
    ]
    experts = [e._replace(at_ns=e.at_ns + offset_ns) for e in recording.experts]
    return Worker(recording.role, recording.rank, recording.pid, recording.uncertainty_ns, spans, experts)


@dataclass(slots=True)
class _Sent:
    """What the attention side knows of one dispatch."""

    dispatch: Span
    collected_ns: dict[int, int] = field(default_factory=dict)  # by ffn_rank
    combine: Span | None = None


def _journeys(workers: Sequence[Worker]) -> list[Journey]:
    """Every dispatch of which both sides still know everything, by FFN worker and then by when it was computed."""
    sent: dict[Key, _Sent] = {}
    for worker in workers:
        if worker.role is Role.ATTENTION:
            _note_sent(worker, sent)
    return [journey for worker in workers if worker.role is Role.FFN for journey in _served(worker, sent)]


def _note_sent(worker: Worker, sent: dict[Key, _Sent]) -> None:
    for span in worker.spans:
        if span.activity in (Activity.DISPATCH, Activity.COLLECT, Activity.COMBINE):
            key = Key(worker.rank, span.microbatch, span.step, span.layer)
            if span.activity is Activity.DISPATCH:
                sent[key] = _Sent(span)
            elif key in sent and span.activity is Activity.COLLECT:
                sent[key].collected_ns[span.peer] = span.start_ns
            elif key in sent:
                sent[key].combine = span


def _served(worker: Worker, sent: dict[Key, _Sent]) -> Iterator[Journey]:
    """A call of the FFN is about the dispatches that are answered right behind it."""
    taken: dict[Key, tuple[int, int]] = {}  # when, and how long the worker had gathered until then, in ns
    gathered_ns, call_gathered_ns = 0, 0
    compute: Span | None = None
    for span in worker.spans:
        if span.activity is Activity.GATHER:
            gathered_ns += span.end_ns - span.start_ns
        elif span.activity is Activity.RECEIVE:
            taken[Key(span.peer, span.microbatch, span.step, span.layer)] = (span.start_ns, gathered_ns)
        elif span.activity is Activity.FFN:
            compute, call_gathered_ns = span, gathered_ns
        elif span.activity is Activity.COMBINE and compute is not None:
            key = Key(span.peer, span.microbatch, span.step, span.layer)
            known, arrival = sent.get(key), taken.pop(key, None)
            if known and arrival and known.combine and worker.rank in known.collected_ns:
                yield Journey(
                    key,
                    worker.rank,
                    known.dispatch,
                    arrival[0],
                    call_gathered_ns - arrival[1],
                    compute,
                    known.collected_ns[worker.rank],
                    known.combine,
                )


def overlapping(spans: Sequence[Span], starts: Sequence[int], start_ns: int, end_ns: int) -> range:
    """Which of the spans, which follow one another and begin at `starts`, overlap [start_ns, end_ns)."""
    first = max(0, bisect_right(starts, start_ns) - 1)
    if first < len(spans) and spans[first].end_ns <= start_ns:
        first += 1
    return range(first, max(first, bisect_left(starts, end_ns)))
