"""Which attention worker takes a request. Pure: counts in, an attention_rank out.

POLICIES is where another policy plugs in: a Policy under a name, chosen by RouterSettings.policy. Deployments always
use least_loaded: no key of the deployment file and no flag chooses another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from afd.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Load:
    """What this router has in flight on one attention worker, queued or running; tokens: prompts and answers"""

    attention_rank: int
    requests: int
    tokens: int


class Policy(Protocol):
    """Chooses among workers that can take a request. May keep state between calls; called on one thread."""

    def choose(self, loads: Sequence[Load]) -> int:
        """The attention_rank to use. `loads` is never empty and sorted by attention_rank."""


class LeastLoaded:
    """The worker with the fewest tokens in flight; then the fewest requests, then the lowest attention_rank."""

    def choose(self, loads: Sequence[Load]) -> int:
        return min(loads, key=lambda load: (load.tokens, load.requests, load.attention_rank)).attention_rank


class RoundRobin:
    """Each worker in turn, whatever its load."""

    def __init__(self) -> None:
        self._last = -1

    def choose(self, loads: Sequence[Load]) -> int:
        ranks = [load.attention_rank for load in loads]
        self._last = next((rank for rank in ranks if rank > self._last), ranks[0])
        return self._last


POLICIES: dict[str, Callable[[], Policy]] = {"least_loaded": LeastLoaded, "round_robin": RoundRobin}


def create(name: str) -> Policy:
    """Raises ConfigError, listing the choices, for a name that is not in POLICIES."""
    if name not in POLICIES:
        raise ConfigError(f"router policy is {name!r}; choose one of {', '.join(POLICIES)}")
    return POLICIES[name]()
