from __future__ import annotations

import pytest

from afd.errors import ConfigError
from router.policy import LeastLoaded, Load, RoundRobin, create


def test_least_loaded_counts_tokens_then_requests_then_rank():
    policy = LeastLoaded()
    assert policy.choose([Load(0, 1, 100), Load(1, 9, 99)]) == 1
    assert policy.choose([Load(0, 2, 100), Load(1, 1, 100)]) == 1
    assert policy.choose([Load(0, 1, 100), Load(1, 1, 100)]) == 0


def test_round_robin_takes_each_in_turn_and_skips_who_is_gone():
    policy = RoundRobin()
    three, two = [Load(r, 0, 0) for r in (0, 1, 2)], [Load(r, 0, 0) for r in (0, 2)]
    assert [policy.choose(three) for _ in range(4)] == [0, 1, 2, 0]
    assert [policy.choose(two) for _ in range(3)] == [2, 0, 2]


def test_an_unknown_policy_is_refused_with_the_choices():
    with pytest.raises(ConfigError, match=r"'best'.*least_loaded, round_robin"):
        create("best")
