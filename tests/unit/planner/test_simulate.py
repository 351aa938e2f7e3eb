"""A simulated cluster against what can be worked out by hand, and against the closed form of the planner."""

from __future__ import annotations

import statistics
import time

import pytest

from afd.errors import ConfigError
from afd.pipeline.analysis import picture
from afd.pipeline.summary import summarise
from afd.planner.simulate.run import Simulation
from afd.planner.simulate.scenario import Fault
from afd.planner.stages import Load, step_s
from afd.topology import ffn_shards
from afd.types import Role
from tests.unit.planner.machines import POLICIES, Machine, run, scenario


def test_one_microbatch_alone_takes_its_stages_one_after_another() -> None:
    machine = Machine(num_layers=3, ends=500e-6, bandwidth=1e6)
    outcome = run(scenario(microbatches=1, requests=8, gather_window_s=0.0), machine)
    layer_s = (100e-6 + 8e-6) + 8e-6 + 10e-6 + (100e-6 + 8e-6) + 8e-6 + 10e-6
    assert outcome.tpot_s is not None
    assert outcome.tpot_s.p50 == pytest.approx(3 * layer_s + 500e-6, rel=1e-9)
    assert outcome.tokens_per_s == pytest.approx(8 / outcome.tpot_s.p50)


@pytest.mark.parametrize("topology", ["1A1F", "2A2F", "4A2F"])
@pytest.mark.parametrize("microbatches", [1, 2, 3])
def test_without_disturbance_it_agrees_with_the_closed_form(topology: str, microbatches: int) -> None:
    machine = Machine(num_layers=8, latency_s=50e-6)
    asked = scenario(topology, microbatches=microbatches, requests=24, tokens=30)
    workers = asked.topology
    load = Load(workers.attention, workers.ffn, microbatches, 24 * workers.attention, 100)
    outcome = run(asked, machine)
    assert outcome.tpot_s is not None
    assert outcome.tpot_s.p50 == pytest.approx(step_s(machine, load), rel=0.1)


def test_a_sequence_that_stands_for_several_requests_takes_their_time() -> None:
    one_each, together = scenario("2A2F", requests=60, tokens=20), scenario("2A2F", requests=120, tokens=20)
    assert (one_each.limits.weight, together.limits.weight) == (1, 2)
    half = Machine(attention_per_token=0.5e-6, ffn_per_token=0.5e-6, bandwidth=2e9)
    a, b = run(one_each), run(together, half)
    assert b.tokens == 2 * a.tokens
    assert a.tpot_s is not None
    assert b.tpot_s is not None
    assert b.tpot_s.mean == pytest.approx(a.tpot_s.mean)


def test_a_straggler_slows_its_own_requests_down_and_hardly_the_others() -> None:
    plain = run(scenario("4A1F", tokens=30))
    slow = run(scenario("4A1F", tokens=30, slow={(Role.ATTENTION, 2): 4.0}))
    assert plain.tpot_s is not None
    assert slow.tpot_s is not None
    assert slow.tpot_s.p99 > 2 * plain.tpot_s.p99
    assert slow.tpot_s.p50 < 1.3 * plain.tpot_s.p50


def test_a_slow_ffn_worker_and_skewed_experts_slow_everybody() -> None:
    shards = ffn_shards(2, "ep", 8)
    busy = Machine(ffn_per_token=20e-6)
    plain = run(scenario("2A2F", shards=shards), busy)
    skewed = run(scenario("2A2F", shards=shards, skew=1.8), busy)
    slow = run(scenario("2A2F", shards=shards, slow={(Role.FFN, 1): 3.0}), busy)
    assert skewed.tokens_per_s < 0.95 * plain.tokens_per_s  # another rank in each layer: microbatches hide some of it
    assert slow.tokens_per_s < 0.5 * plain.tokens_per_s


def test_a_lost_ffn_worker_costs_the_time_it_is_away_and_no_token() -> None:
    plain = run(scenario("2A2F", tokens=40))
    away = run(scenario("2A2F", tokens=40, faults=(Fault(1, plain.simulated_s / 2, 0.05),)))
    assert away.tokens == away.tokens_wanted == plain.tokens
    assert away.sent_again > 0
    assert 0.05 <= away.simulated_s - plain.simulated_s < 0.06


def test_requests_that_arrive_have_their_prompts_computed_and_preemption_loses_no_token() -> None:
    asked = scenario("2A1F", requests=20, context=200, tokens=20, rate=500.0, kv_tokens=640)
    outcome = run(asked)
    assert outcome.preemptions > 0
    assert outcome.tokens == outcome.tokens_wanted == 2 * 20 * 20
    assert outcome.ttft_s is not None
    assert outcome.ttft_s.p50 > 0


def test_the_number_of_microbatches_is_found_by_trying_as_in_the_engine() -> None:
    outcome = run(scenario(microbatches=4, requests=64, tokens=60, auto=True))
    assert outcome.tokens == 64 * 60


def test_slices_of_the_head_let_others_go_between() -> None:
    machine = Machine(ends=2e-3)
    whole, sliced = (run(scenario(tokens=30, head_slices=n), machine) for n in (1, 8))
    assert sliced.tokens == whole.tokens
    assert sliced.tokens_per_s >= 0.99 * whole.tokens_per_s


def test_the_timeline_is_one_that_the_live_analysis_reads() -> None:
    simulation = Simulation(scenario("2A2F", tokens=30), Machine(latency_s=100e-6), POLICIES, record_from_s=0.0)
    outcome = simulation.run()
    summary = summarise(picture(simulation.timelines(), outcome.simulated_s))
    assert summary.window_s == pytest.approx(outcome.simulated_s, rel=1e-3)
    for role, busy in summary.busy.items():
        assert busy == pytest.approx(outcome.busy[role], abs=0.02)
        assert sum(summary.bubbles[role].values()) == pytest.approx(1 - busy, abs=1e-6)
        assert summary.bubbles[role].get("unknown", 0.0) < 0.02
    assert 100 <= summary.phases["wire"].median_us < 130
    assert summary.sampled_tokens_per_s == pytest.approx(outcome.tokens / outcome.simulated_s, rel=0.05)


def test_what_cannot_be_is_refused_in_a_sentence() -> None:
    with pytest.raises(ConfigError, match="KV cache holds 320 tokens"):
        run(scenario(kv_tokens=320))
    with pytest.raises(ConfigError, match="straggler ffn:3 does not exist"):
        scenario("2A2F", slow={(Role.FFN, 3): 2.0})
    with pytest.raises(ConfigError, match="skew is 3; with 2 EP groups"):
        scenario("2A2F", skew=3.0)


def test_time_grows_linearly_with_events() -> None:
    def seconds_per_event(tokens: int) -> float:
        simulation = Simulation(scenario("8A2F", tokens=tokens), Machine(), POLICIES)
        began_s = time.process_time()
        events = simulation.run().events
        return (time.process_time() - began_s) / events

    few, many = (statistics.median(seconds_per_event(tokens) for _ in range(3)) for tokens in (10, 80))
    assert many < 3 * few


def test_a_hundred_steps_of_144_cards_are_simulated_in_seconds() -> None:
    """16 attention workers and 2 FFN workers of 8 cards each, 61 layers: here 10 steps, in a tenth of the time and with
    a margin of three for a busy machine."""
    machine = Machine(num_layers=61, attention=150e-6, ffn=150e-6, ffn_per_token=30e-9, bandwidth=65e6)
    asked = scenario("16A2F", requests=384, context=32768, tokens=10, gather_window_s=200e-6)
    began_s = time.process_time()
    outcome = run(asked, machine)
    assert outcome.tokens == 16 * 384 * 10
    assert time.process_time() - began_s < 3.0
