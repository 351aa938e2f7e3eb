"""Machines whose stage times are constants and slopes, and the policies that the workers use."""

from __future__ import annotations

from dataclasses import dataclass, replace

from afd.planner.simulate.outcome import Outcome
from afd.planner.simulate.policies import Limits, Policies
from afd.planner.simulate.run import Simulation
from afd.planner.simulate.scenario import Demand, Scenario, weight
from afd.topology import Topology, ffn_shards
from attention_worker.replay import Replay
from ffn_worker.batcher import Batcher, Item

POLICIES = Policies(Replay, Batcher, Item)


@dataclass(frozen=True)
class Machine:
    """Seconds: fixed, and for each token (and token of context). `bandwidth`: tokens that a wire passes a second."""

    num_layers: int = 4
    attention: float = 100e-6
    attention_per_token: float = 1e-6
    attention_per_context: float = 0.0
    ffn: float = 100e-6
    ffn_per_token: float = 1e-6
    ends: float = 0.0
    bandwidth: float = 1e9
    latency_s: float = 10e-6

    def attention_s(self, layer: int, tokens: float, kv_tokens: float) -> float:
        return self.attention + self.attention_per_token * tokens + self.attention_per_context * kv_tokens

    def ends_s(self, tokens: float) -> float:
        return self.ends

    def ffn_s(self, layer: int, tokens: float, skew: float = 1.0) -> float:
        return self.ffn + self.ffn_per_token * tokens * skew

    def dispatch_s(self, layer: int, tokens: float) -> float:
        return tokens / self.bandwidth

    def combine_s(self, layer: int, tokens: float) -> float:
        return tokens / self.bandwidth


def scenario(
    topology: str = "1A1F",
    *,
    microbatches: int = 3,
    requests: int = 12,
    context: int = 100,
    tokens: int = 10,
    spread: float = 0.0,
    rate: float | None = None,
    kv_tokens: int = 0,
    auto: bool = False,
    **more: object,
) -> Scenario:
    """`more` as in Scenario. Room for all of the requests at once, unless `kv_tokens` says otherwise."""
    counts = Topology.parse(topology)
    together = weight(requests)
    room = kv_tokens or requests * (int(context * (1 + spread)) + tokens + 32)
    limits = Limits(
        microbatches, auto=auto, max_batch_tokens=4096, max_running=2 * requests, kv_tokens=room, weight=together
    )
    demand = Demand(requests, context, tokens, spread, rate)
    plain = Scenario(counts, ffn_shards(counts.ffn, "ep", 0), limits, demand, gather_window_s=50e-6)
    return replace(plain, **more)  # type: ignore[arg-type]


def run(scenario: Scenario, machine: Machine | None = None) -> Outcome:
    return Simulation(scenario, machine or Machine(), POLICIES).run()
