"""What holds of every simulation: tokens are conserved; a faster wire does not slow, and jitter does not speed up.

The last two are exact where nobody chooses: with one microbatch and one attention worker, each event only ever waits
for others, so its time grows with every duration. Where the policies choose, an earlier arrival can be served in
smaller calls, and one run may gain by delay (Graham's anomalies): there the bound has a margin for one run, and a
smaller one for the mean of several. The draws of jitter are the same in both runs of a pair.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

from hypothesis import given, settings
from hypothesis import strategies as st

from afd.planner.simulate.scenario import Fault
from afd.types import Role
from tests.unit.planner.machines import Machine, run, scenario

TOPOLOGIES = st.sampled_from(["1A1F", "2A1F", "1A2F", "3A2F"])
ANOMALY = 1.25  # one run against another
MEAN_ANOMALY = 1.05
quick = settings(max_examples=25, deadline=None, derandomize=True)


@quick
@given(
    topology=TOPOLOGIES,
    microbatches=st.integers(1, 4),
    requests=st.integers(1, 20),
    tokens=st.integers(1, 12),
    rate=st.none() | st.floats(10, 5000),
    spread=st.floats(0, 0.9),
    jitter=st.floats(0, 2),
    seed=st.integers(0, 100),
    tight=st.booleans(),
    away_s=st.none() | st.floats(0.0001, 0.02),
)
def test_every_token_asked_for_is_given_once(
    topology: str, microbatches: int, requests: int, tokens: int, rate: float | None, spread: float, jitter: float,
    seed: int, tight: bool, away_s: float | None,
) -> None:  # fmt: skip
    asked = scenario(
        topology,
        microbatches=microbatches,
        requests=requests,
        tokens=tokens,
        rate=rate,
        spread=spread,
        kv_tokens=400 if tight and rate else 0,
        jitter=jitter,
        seed=seed,
        slow={(Role.ATTENTION, 0): 1.5},
        faults=() if away_s is None else (Fault(0, 0.001, away_s), Fault(0, 0.002, away_s)),
    )
    outcome = run(asked)
    assert outcome.tokens == outcome.tokens_wanted == requests * asked.topology.attention * tokens


@quick
@given(
    bandwidth=st.floats(1e5, 1e8),
    more=st.floats(1, 10),
    layers=st.integers(1, 6),
    requests=st.integers(1, 30),
    jitter=st.floats(0, 1),
)
def test_more_bandwidth_is_never_slower_for_one_microbatch(
    bandwidth: float, more: float, layers: int, requests: int, jitter: float
) -> None:
    asked = scenario(microbatches=1, requests=requests, jitter=jitter)
    narrow, wide = (
        run(asked, Machine(num_layers=layers, bandwidth=rate)).simulated_s for rate in (bandwidth, more * bandwidth)
    )
    assert wide <= narrow * (1 + 1e-9)


@quick
@given(
    topology=TOPOLOGIES, microbatches=st.integers(2, 4), bandwidth=st.floats(1e5, 1e7), more=st.floats(1, 10),
    requests=st.integers(4, 24),
)  # fmt: skip
def test_more_bandwidth_is_hardly_ever_slower_where_the_policies_choose(
    topology: str, microbatches: int, bandwidth: float, more: float, requests: int
) -> None:
    asked = scenario(topology, microbatches=microbatches, requests=requests)
    narrow, wide = (run(asked, Machine(bandwidth=rate)).simulated_s for rate in (bandwidth, more * bandwidth))
    assert wide <= ANOMALY * narrow


@quick
@given(jitter=st.floats(0, 1), more=st.floats(0, 1), requests=st.integers(1, 30), seed=st.integers(0, 100))
def test_more_jitter_is_never_faster_for_one_microbatch(jitter: float, more: float, requests: int, seed: int) -> None:
    asked = scenario(microbatches=1, requests=requests, jitter=jitter, seed=seed)
    assert run(replace(asked, jitter=jitter + more)).simulated_s >= run(asked).simulated_s * (1 - 1e-9)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    topology=TOPOLOGIES, microbatches=st.integers(2, 4), jitter=st.floats(0, 1), more=st.floats(0, 1),
    requests=st.integers(4, 24),
)  # fmt: skip
def test_more_jitter_is_not_faster_on_average_where_the_policies_choose(
    topology: str, microbatches: int, jitter: float, more: float, requests: int
) -> None:
    asked = [
        scenario(topology, microbatches=microbatches, requests=requests, jitter=jitter, seed=seed) for seed in range(6)
    ]
    calm = fmean(run(one).simulated_s for one in asked)
    shaken = fmean(run(replace(one, jitter=jitter + more)).simulated_s for one in asked)
    assert shaken * MEAN_ANOMALY >= calm
