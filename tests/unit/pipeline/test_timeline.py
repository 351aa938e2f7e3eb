"""The ring of marks: nothing is lost that it says it holds, and spans add up to the wall time."""

from __future__ import annotations

import threading
import time
from itertools import count, pairwise

import pytest

from afd.pipeline.timeline import CALL_TOKENS, Activity, Histogram, Timeline
from afd.types import Role


def test_marks_come_back_with_everything_they_were_given() -> None:
    timeline = Timeline(Role.FFN, 3, capacity=8)
    at_ns = timeline.mark(Activity.RECEIVE, 2, 1 << 40, 60, 64, 3 << 30, 7)
    recording = timeline.since(0, 100)
    assert (recording.role, recording.rank) == (Role.FFN, 3)
    *_, event = recording.events()
    assert event == (at_ns, 1 << 40, 64, 3 << 30, 2, 60, 7, Activity.RECEIVE)
    assert recording.now_ns >= at_ns


def test_a_full_ring_keeps_the_newest_and_forgets_the_oldest() -> None:
    timeline = Timeline(Role.ATTENTION, 0, capacity=16)
    for step in range(100):
        timeline.mark(Activity.ATTENTION, step=step)
        steps = [event.step for event in timeline.since(0, 1000).events() if event.activity == Activity.ATTENTION]
        assert steps == list(range(step + 1))[-15:], "one place is for the mark that may be under way"


@pytest.mark.parametrize("most", [0, 1, 3, 100])
def test_a_reader_gets_as_many_events_as_it_takes_and_those_are_the_newest(most: int) -> None:
    timeline = Timeline(Role.ATTENTION, 0, capacity=64)
    for step in range(1, 10):
        timeline.mark(Activity.ATTENTION, step=step)
    steps = [event.step for event in timeline.since(0, most).events()]
    assert steps == list(range(10))[10 - min(most, 10) :]  # the first is the timeline's own, step 0


def test_the_span_that_went_on_when_the_time_began_is_there() -> None:
    """Without it a long wait would be a hole at the beginning."""
    timeline = Timeline(Role.ATTENTION, 0, capacity=64)
    timeline.mark(Activity.IDLE)
    began_ns = time.monotonic_ns()
    while time.monotonic_ns() < began_ns + 20_000_000:
        pass
    timeline.mark(Activity.SCHEDULE)
    recording = timeline.since(time.monotonic_ns() - 10_000_000, 1000)
    first, *_ = recording.events()
    assert first.activity == Activity.IDLE
    assert first.at_ns <= recording.now_ns - 10_000_000


def test_the_totals_are_the_sum_of_the_spans_and_both_are_the_wall_time() -> None:
    timeline = Timeline(Role.ATTENTION, 0, capacity=1 << 12)
    for i in range(1000):
        timeline.mark((Activity.ATTENTION, Activity.DISPATCH, Activity.WAIT)[i % 3], tokens=2, wire_bytes=5)
    ended_ns = timeline.mark(Activity.OTHER)
    events, totals = list(timeline.since(0, 1 << 12).events()), timeline.totals().activities
    sums_ns: dict[str, int] = {}
    for event, after in pairwise(events):
        label = Activity(event.activity).label
        sums_ns[label] = sums_ns.get(label, 0) + after.at_ns - event.at_ns
    assert sum(sums_ns.values()) == ended_ns - events[0].at_ns
    for label in ("attention", "dispatch", "wait"):
        assert totals[label].seconds == pytest.approx(sums_ns[label] / 1e9, abs=1e-12)
    assert [totals[name].calls for name in ("attention", "dispatch", "wait")] == [334, 333, 333]
    assert (totals["dispatch"].tokens, totals["dispatch"].wire_bytes) == (666, 1665)


def test_reading_while_the_owner_writes_gives_only_whole_events_in_order() -> None:
    timeline = Timeline(Role.FFN, 0, capacity=1 << 12)
    stop = threading.Event()

    def write() -> None:
        for i in count():
            # Every field says the same number, so that an event put together from two would show.
            timeline.mark(Activity.FFN, i % 1000, i, i % 1000, i, i, i % 1000)
            if stop.is_set():
                return

    owner = threading.Thread(target=write)
    owner.start()
    try:
        seen = 0
        while seen < 20:
            events = [e for e in timeline.since(0, 1 << 12).events() if e.activity == Activity.FFN]
            steps = [event.step for event in events]
            assert steps == list(range(steps[0], steps[0] + len(steps))) if steps else True
            assert all(e.tokens == e.wire_bytes == e.step and e.microbatch == e.layer == e.step % 1000 for e in events)
            seen += len(events) > 1000
    finally:
        stop.set()
        owner.join()


def test_the_memory_of_a_ring_is_taken_at_the_start() -> None:
    """A server's memory must not creep up while its rings fill."""
    timeline = Timeline(Role.FFN, 0)
    assert len({id(mark) for mark in timeline._ring}) == len(timeline._ring)


def test_experts_are_counted_and_kept() -> None:
    timeline = Timeline(Role.FFN, 0, capacity=8)
    timeline.count_experts(3, 12)
    timeline.count_experts(5, 8)
    assert [(e.calls, e.tokens) for e in timeline.since(0, 10).experts] == [(3, 12), (5, 8)]
    assert timeline.since(time.monotonic_ns(), 0).experts == ()
    totals = timeline.totals()
    assert (totals.expert_calls, totals.expert_tokens) == (8, 20)


def test_a_histogram_counts_a_value_under_the_first_bound_that_is_not_below_it() -> None:
    histogram = Histogram(CALL_TOKENS)
    for tokens in (1, 2, 3, 4, 4096, 4097):
        histogram.observe(tokens)
    totals = histogram.totals()
    counted = dict(zip((*totals.bounds, None), totals.counts, strict=True))
    assert {bound: n for bound, n in counted.items() if n} == {1.0: 1, 2.0: 1, 4.0: 2, 4096.0: 1, None: 1}
    assert totals.sum == 8203
