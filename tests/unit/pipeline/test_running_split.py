"""What a running split says of itself, against what the clock on the wall and stopwatches around its parts say."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from afd.models.halves import FfnHalf, Routing
from afd.pipeline import perfetto
from afd.pipeline.analysis import Picture, picture
from afd.pipeline.summary import summarise
from afd.pipeline.timeline import Timeline, Timelines
from afd.types import Role, SamplingParams
from tests import chrome_trace
from tests.rig import Rig, split, tiny, weights_of

SPEC = tiny("step3")
TOKENS = 40
PROMPTS = [[i, i + 1, i + 2] for i in range(1, 13)]
PARAMS = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
TOLERANCE = 0.02


def timelines(rig: Rig) -> list[Timeline]:
    return [part.timeline for part in (*rig.engines, *rig.loops)]


def look(rig: Rig, seconds: float) -> Picture:
    since_ns = time.monotonic_ns() - int(seconds * 1e9)
    return picture(Timelines(tuple(t.since(since_ns, 1 << 16) for t in timelines(rig))), seconds)


@dataclass
class Stopwatch:
    """Around an FFN half: each call takes `least_s` seconds longer, and is timed from outside."""

    ffn: FfnHalf
    least_s: float
    seconds: float = 0.0
    calls: int = 0

    def __post_init__(self) -> None:
        self._compute = self.ffn.layer

    def layer(self, layer: int, y: torch.Tensor, routing: Routing | None) -> torch.Tensor | None:
        began = time.perf_counter()
        out = self._compute(layer, y, routing)
        time.sleep(self.least_s)  # lets the other threads run, as a long product would
        self.seconds += time.perf_counter() - began
        self.calls += 1
        return out


@pytest.mark.parametrize(("topology", "transport"), [("1A1F", "inproc"), ("2A2F", "shm"), ("1A2F", "grpc")])
def test_every_workers_sums_agree_with_the_wall_clock(topology: str, transport: str) -> None:
    with split(SPEC, weights_of(SPEC), topology, transport=transport) as rig:
        began = time.perf_counter()
        rig.generate(PROMPTS, PARAMS)
        wall_s = time.perf_counter() - began
        found = look(rig, wall_s)
        assert found.window_s == pytest.approx(wall_s, rel=TOLERANCE)
        for worker in found.workers:
            seconds = sum(span.end_ns - span.start_ns for span in found.clipped(worker)) / 1e9
            assert seconds == pytest.approx(wall_s, rel=TOLERANCE), worker.name
        for worker, summary in zip(found.workers, summarise(found).workers, strict=True):
            assert sum(summary.activities.values()) == pytest.approx(1.0), worker.name
            assert sum(summary.bubbles.values()) == pytest.approx(1.0 - summary.busy), worker.name


def test_the_totals_of_a_running_worker_grow_as_the_clock_on_the_wall_does() -> None:
    def sums(all_of: Sequence[Timeline]) -> list[float]:
        return [sum(total.seconds for total in t.totals().activities.values()) for t in all_of]

    with split(SPEC, weights_of(SPEC)) as rig:
        rig.generate(PROMPTS[:1], PARAMS)
        before, began = sums(timelines(rig)), time.perf_counter()
        rig.generate(PROMPTS * 3, PARAMS)
        after, wall_s = sums(timelines(rig)), time.perf_counter() - began
        for one, other in zip(before, after, strict=True):
            # What goes on at the moment of looking is not counted yet: at either end a wait of a few milliseconds.
            assert other - one == pytest.approx(wall_s, rel=TOLERANCE, abs=0.02)


def test_the_time_of_the_ffn_calls_is_what_a_stopwatch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one microbatch the attention side does nothing meanwhile, and is told why."""
    with split(SPEC, weights_of(SPEC), microbatches=1) as rig:
        watch = Stopwatch(rig.loops[0].ffn, least_s=0.002)
        monkeypatch.setattr(watch.ffn, "layer", watch.layer)
        began = time.perf_counter()
        rig.generate(PROMPTS[:4], PARAMS)
        wall_s = time.perf_counter() - began
        total = rig.loops[0].timeline.totals().activities["ffn"]
        assert total.calls == watch.calls
        assert watch.seconds <= total.seconds <= 1.1 * watch.seconds
        summary = summarise(look(rig, wall_s))
        ffn = next(w for w in summary.workers if w.role is Role.FFN)
        assert ffn.activities["ffn"] * summary.window_s == pytest.approx(watch.seconds, rel=0.1)
        bubbles = summary.bubbles["attention"]
        assert max(bubbles, key=lambda cause: bubbles[cause]) == "ffn"
        assert bubbles["ffn"] * summary.window_s == pytest.approx(watch.seconds, rel=0.1)
        assert summary.efficiency == pytest.approx(summary.busy["ffn"])
        assert summary.phases["ffn"].mean_us == pytest.approx(1e6 * watch.seconds / watch.calls, rel=0.1)


def test_every_dispatch_is_followed_over_all_ffn_workers() -> None:
    with split(SPEC, weights_of(SPEC), "2A2F", microbatches=2) as rig:
        rig.generate(PROMPTS, PARAMS)
        rig.check_idle()
        found = look(rig, 60.0)
        dispatches = sum(m.steps for engine in rig.engines for m in engine.microbatches) * SPEC.layers
        assert len(found.journeys) == 2 * dispatches
        assert len({(*j.key, j.ffn_rank) for j in found.journeys}) == len(found.journeys)
        for journey in found.journeys:
            assert journey.dispatch.start_ns < journey.taken_ns <= journey.compute.start_ns
            assert journey.compute.end_ns <= journey.collected_ns <= journey.combine.start_ns
        summary = summarise(found)
        assert summary.wire_bytes_per_token is not None
        assert summary.sampled_tokens_per_s * found.window_s == pytest.approx(len(PROMPTS) * TOKENS)


def test_bytes_per_token_are_those_of_the_tensors() -> None:
    """Four layers, two of them with a gate: y there, a partial sum back, and three experts' ids and weights."""
    with split(SPEC, weights_of(SPEC)) as rig:
        rig.generate(PROMPTS, PARAMS)
        rig.check_idle()
        summary = summarise(look(rig, 60.0))
        there_and_back, routing = 2 * SPEC.hidden * 4, 8 * SPEC.top_k
        assert summary.wire_bytes_per_token == pytest.approx(4 * there_and_back + 2 * routing)
        there, back = rig.loops[0].timeline.totals().activities, rig.engines[0].timeline.totals().activities
        tokens = back["attention"].tokens
        assert there["receive"].wire_bytes == tokens * (there_and_back / 2 + routing / 2)
        assert back["collect"].wire_bytes == tokens * there_and_back / 2


def test_the_trace_of_a_running_split_is_one_that_viewers_take() -> None:
    with split(SPEC, weights_of(SPEC), "2A1F") as rig:
        rig.generate(PROMPTS, PARAMS)
        rig.check_idle()
        found = look(rig, 60.0)
        events = chrome_trace.check(perfetto.document(found))
        assert len(events["s"]) == 2 * len(found.journeys) > 0
        assert {e["name"] for e in events["X"]} >= {
            "attention",
            "dispatch",
            "wire",
            "queue",
            "ffn",
            "combine",
            "sample",
        }


def test_experts_are_counted_in_every_61st_call_only() -> None:
    with split(SPEC, weights_of(SPEC)) as rig:
        rig.generate(PROMPTS, PARAMS)
        rig.check_idle()
        totals = rig.loops[0].timeline.totals()
        calls_of_experts = rig.loops[0].counters.calls // 2
        assert len(rig.loops[0].timeline.since(0, 1).experts) == (calls_of_experts + 60) // 61
        assert totals.expert_calls <= SPEC.num_experts * ((calls_of_experts + 60) // 61)
        assert totals.expert_tokens % SPEC.top_k == 0
        assert totals.expert_tokens >= totals.expert_calls > 0


def test_steps_and_calls_are_counted_by_size() -> None:
    with split(SPEC, weights_of(SPEC)) as rig:
        rig.generate(PROMPTS, PARAMS)
        rig.check_idle()
        engine, loop = rig.engines[0], rig.loops[0]
        steps, calls = engine.timeline.work, loop.timeline.work
        assert sum(steps.totals().counts) == sum(m.steps for m in engine.microbatches)
        assert sum(calls.totals().counts) == loop.counters.calls
        assert calls.totals().sum == loop.counters.tokens
