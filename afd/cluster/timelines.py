"""Collects every worker's timeline, and puts them on one clock: that of who collects."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from typing import Any

from afd.cluster.host import Handle
from afd.pipeline.timeline import Recording, Timelines

PROBES = 4  # questions for the time; the quickest answer counts
ANSWER_S = 5.0  # longest wait for all answers together


@dataclass(frozen=True, slots=True)
class Offset:
    """What to add to a worker's clock to have ours, and how wrong that can be."""

    ns: int
    uncertainty_ns: int


def offset(asked_ns: int, theirs_ns: int, answered_ns: int) -> Offset:
    """From one question for the time. All processes of a host have the same CLOCK_MONOTONIC, so a time inside the
    round trip needs no correction. Any other is another host's, taken half-way."""
    if asked_ns <= theirs_ns <= answered_ns:
        return Offset(0, 0)
    return Offset((asked_ns + answered_ns) // 2 - theirs_ns, (answered_ns - asked_ns + 1) // 2)


def collect(handles: Sequence[Handle], seconds: float, max_events: int) -> Timelines:
    """The last `seconds` of every worker's timeline, each at most its share of `max_events`. Workers that fail or do
    not answer in time are named in `missing`.

    All are asked for what they did since one moment, `seconds` before this call: they answer one after the other, on
    a busy machine with tenths of a second between, and have to have that much time in common."""
    since_ns, deadline = time.monotonic_ns() - int(seconds * 1e9), time.monotonic() + ANSWER_S
    offsets: dict[Handle, Offset] = {}
    for _ in range(PROBES):
        for handle, probe in [(handle, _Probe(handle)) for handle in handles]:
            found = probe.offset(deadline)
            if found and (handle not in offsets or found.uncertainty_ns < offsets[handle].uncertainty_ns):
                offsets[handle] = found
    share = max(1, max_events // max(1, len(handles)))
    here = Offset(0, 0)
    calls = {h: h.submit("timeline", since_ns - offsets.get(h, here).ns, share) for h in handles}
    wait(calls.values(), max(0.0, deadline - time.monotonic()))
    recordings, missing = [], []
    for handle, call in calls.items():
        problem = _problem(handle, call)
        if problem or handle not in offsets:
            missing.append(problem or f"{handle.name} did not say what time it has within {ANSWER_S:g} s")
        else:
            recording: Recording = call.result()
            found = offsets[handle]
            recordings.append(replace(recording, offset_ns=found.ns, uncertainty_ns=found.uncertainty_ns))
    return Timelines(tuple(recordings), tuple(missing))


class _Probe:
    """One question for a worker's time, on its way."""

    def __init__(self, handle: Handle) -> None:
        self._answered_ns = 0
        self._asked_ns = time.monotonic_ns()
        self._call = handle.submit("timeline", 0, 0)
        self._call.add_done_callback(self._answered)

    def _answered(self, _: Future[Any]) -> None:
        self._answered_ns = time.monotonic_ns()

    def offset(self, deadline: float) -> Offset | None:
        """Waits for the answer. None when there is none by `deadline`, or it is an error."""
        wait([self._call], max(0.0, deadline - time.monotonic()))
        if not self._call.done() or self._call.exception() is not None:
            return None
        recording: Recording = self._call.result()
        # A future wakes who waits for it before it runs its callbacks.
        return offset(self._asked_ns, recording.now_ns, self._answered_ns or time.monotonic_ns())


def _problem(handle: Handle, call: Future[Any]) -> str:
    if not call.done():
        return f"{handle.name} did not send its timeline within {ANSWER_S:g} s"
    error = call.exception()
    return f"{handle.name}: {error}" if error is not None else ""
