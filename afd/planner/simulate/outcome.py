"""What a simulation comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from afd.planner.simulate.ledger import Ledger


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and percentiles, in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None where there are none."""
        if not values:
            return None
        ordered = sorted(values)
        p50, p90, p99 = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.9, 0.99))
        return cls(sum(ordered) / len(ordered), p50, p90, p99)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Times in simulated seconds. `busy`: by role, the mean of its workers over the whole time."""

    requests: int
    tokens: int
    tokens_wanted: int
    simulated_s: float
    events: int
    tokens_per_s: float
    tpot_s: Spread | None  # of requests, each its mean
    gap_s: Spread | None  # between one token of a request and the next, of all
    ttft_s: Spread | None  # of requests that arrived
    busy: Mapping[str, float]
    preemptions: int
    sent_again: int  # dispatches, because an FFN worker was away


def tokens_per_s(ledger: Ledger, fixed: bool) -> float:
    """Of all sequences. A fixed batch never ends in life: what its sequences get each second between their first tokens
    and their last, added up, so that filling and draining the pipeline do not count. Otherwise over the whole time."""
    tpots_s = ledger.tpots_s()
    if fixed and len(tpots_s) == len(ledger.asked):
        return sum(1 / tpot_s for tpot_s in tpots_s)
    return sum(ledger.got) / max(ledger.last_s)
