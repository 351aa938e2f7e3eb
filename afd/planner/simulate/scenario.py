"""What is simulated: how many workers of which settings, what is asked of them, and what goes wrong."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from afd.errors import ConfigError
from afd.planner.simulate.policies import Limits
from afd.topology import FfnShard, Topology
from afd.types import Role

# A worker's scheduler handles this many sequences at most; of more requests, several are one sequence (Limits.weight).
MOST_SEQUENCES = 64


@dataclass(frozen=True, slots=True)
class Demand:
    """What clients want. `requests` for each attention worker. All are there at the beginning, with their prompts
    computed, or, with a `rate` (per second, over all workers, Poisson), they come in turn and start with their prompt.
    Each has `context` tokens, give or take the share `spread`, and wants `tokens` more."""

    requests: int
    context: int
    tokens: int
    spread: float = 0.0
    rate: float | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """FFN worker `ffn_rank` is away from `at_s` for `for_s` seconds. What it had is lost and sent again."""

    ffn_rank: int
    at_s: float
    for_s: float


@dataclass(frozen=True, slots=True)
class Scenario:
    """`jitter`: how much longer things take on average, as a share; nothing is ever quicker than the clock says.
    `skew`: routed tokens of the busiest EP group over an even share, in each layer another group. `slow`: how many
    times slower a worker computes. Raises ConfigError for what cannot be."""

    topology: Topology
    shards: tuple[FfnShard, ...]
    limits: Limits
    demand: Demand
    gather_window_s: float
    head_slices: int = 1  # pieces of the LM head, between which more urgent microbatches go
    jitter: float = 0.0
    skew: float = 1.0
    slow: Mapping[tuple[Role, int], float] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        workers = {Role.ATTENTION: self.topology.attention, Role.FFN: self.topology.ffn}
        for (role, rank), factor in self.slow.items():
            _known(f"straggler {role.value}:{rank}", rank, workers[role], role)
            if factor < 1:
                raise ConfigError(f"straggler {role.value}:{rank} is {factor:g} times slower; it must be at least 1")
        for fault in self.faults:
            _known(f"fault ffn:{fault.ffn_rank}", fault.ffn_rank, workers[Role.FFN], Role.FFN)
            if fault.at_s < 0 or fault.for_s <= 0:
                raise ConfigError(f"fault ffn:{fault.ffn_rank} needs a time of 0 or more and a length above 0")
        ep = self.shards[0].ep
        if not 1 <= self.skew <= ep:
            raise ConfigError(f"skew is {self.skew:g}; with {ep} EP groups it lies between 1 and {ep}")
        if self.jitter < 0:
            raise ConfigError(f"jitter is {self.jitter:g}; it must be 0 or more")
        if not 0 <= self.demand.spread < 1:
            raise ConfigError(f"context spread is {self.demand.spread:g}; it lies between 0 and 1")
        if self.demand.rate is not None and self.demand.rate <= 0:
            raise ConfigError(f"rate is {self.demand.rate:g} requests per second; it must be above 0")

    def load_of(self, shard: FfnShard, layer: int) -> float:
        """Routed tokens of the shard's EP group in `layer`, over an even share."""
        if shard.ep == 1:
            return 1.0
        return self.skew if shard.ep_rank == layer % shard.ep else (shard.ep - self.skew) / (shard.ep - 1)


@dataclass(frozen=True, slots=True)
class Wanted:
    """One sequence: `at_s` None when it is there from the beginning, with its prompt computed."""

    attention_rank: int
    context: int
    tokens: int
    at_s: float | None


def wanted(scenario: Scenario) -> Iterator[Wanted]:
    """Every sequence, in the order in which they come. A function of the scenario alone."""
    demand, draw = scenario.demand, random.Random(f"load {scenario.seed}")
    workers = scenario.topology.attention
    each = max(1, round(demand.requests / scenario.limits.weight))
    at_s = 0.0
    for number in range(each * workers):
        context = max(2, round(demand.context * (1 + demand.spread * draw.uniform(-1, 1))))
        if demand.rate is not None:
            at_s += draw.expovariate(demand.rate / scenario.limits.weight)
        yield Wanted(number % workers, context, demand.tokens, None if demand.rate is None else at_s)


def weight(requests: int) -> int:
    """How many requests one sequence stands for, when each worker has `requests`."""
    return -(-requests // MOST_SEQUENCES)


def _known(what: str, rank: int, count: int, role: Role) -> None:
    if not 0 <= rank < count:
        raise ConfigError(f"{what} does not exist: there are {count} {role.value} workers, counted from 0")
