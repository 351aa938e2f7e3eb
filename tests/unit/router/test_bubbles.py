"""Why workers waited, in the metrics: as the trace's summary has it, and of what was seen alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry

from afd.errors import ClusterError
from afd.pipeline import analysis, summary
from afd.pipeline.timeline import Timelines
from router.telemetry import bubbles
from router.telemetry.bubbles import Bubbles
from tests.unit.pipeline.recordings import one_layer

Collect = Callable[[float, int], Timelines]
Samples = dict[tuple[str, ...], float]


def after_looks(collect: Collect, wanted: int) -> Samples:
    """What is told once `wanted` looks have been taken and what they saw was added."""
    looks = 0
    enough = threading.Event()

    def counting(seconds: float, max_events: int) -> Timelines:
        nonlocal looks
        assert (seconds, max_events) == (bubbles.WINDOW_S, bubbles.MAX_EVENTS)
        looks += 1
        if looks > wanted:  # the last one has been added by now
            enough.set()
            raise ClusterError("that was all")
        return collect(seconds, max_events)

    told = Bubbles(counting)

    async def look() -> None:
        looking = asyncio.create_task(told.run(every_s=0.0))
        assert await asyncio.to_thread(enough.wait, 10.0)
        looking.cancel()

    asyncio.run(look())
    registry = CollectorRegistry()
    registry.register(told)
    return {(s.name, *s.labels.values()): s.value for family in registry.collect() for s in family.samples}


def test_the_causes_are_the_summarys_and_the_seconds_those_that_were_seen() -> None:
    found = after_looks(lambda *_: one_layer(), 3)
    known = summary.summarise(analysis.picture(one_layer(), asked_s=bubbles.WINDOW_S))
    assert known.window_s == pytest.approx(0.001)
    expected: Samples = {}
    for worker in known.workers:
        role, rank = worker.role.value, str(worker.rank)
        expected["afd_bubble_window_seconds_total", role, rank] = 0.003
        for cause, share in worker.bubbles.items():
            expected["afd_bubble_seconds_total", role, rank, cause] = 0.003 * share
    assert found == pytest.approx(expected)
    assert found["afd_bubble_seconds_total", "attention", "0", "ffn"] == pytest.approx(3 * 200e-6)
    waited = sum(value for key, value in found.items() if key[:2] == ("afd_bubble_seconds_total", "ffn"))
    assert waited == pytest.approx(0.003 * (1 - known.workers[1].busy))


@pytest.mark.parametrize("error", [ClusterError("the controller is gone"), ZeroDivisionError()])
def test_a_look_that_fails_is_left_out_and_the_next_is_taken(error: Exception) -> None:
    answers = iter([error, Timelines((), ("ffn_rank 0 is late",)), one_layer()])

    def collect(_seconds: float, _max_events: int) -> Timelines:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert after_looks(collect, 3)["afd_bubble_window_seconds_total", "ffn", "0"] == pytest.approx(0.001)
