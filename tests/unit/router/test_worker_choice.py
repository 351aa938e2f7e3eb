from __future__ import annotations

from typing import get_args

import pytest

from afd.config import PolicyName
from afd.errors import ConfigError
from afd.types import GenerateRequest, SamplingParams
from router.relay.policy import POLICIES, LeastLoaded, Load, Prefix, RoundRobin, Session, create

BLOCK = 4


def request(*tokens: int, salt: str = "") -> GenerateRequest:
    return GenerateRequest("r", tokens or (1,), SamplingParams(), cache_salt=salt)


def loads(*requests: int) -> list[Load]:
    """Workers with so many requests of 100 tokens each."""
    return [Load(rank, count, 100 * count) for rank, count in enumerate(requests)]


def test_least_loaded_counts_tokens_then_requests_then_rank():
    policy = LeastLoaded()
    assert policy.choose(request(), "", [Load(0, 1, 100), Load(1, 9, 99)]) == 1
    assert policy.choose(request(), "", [Load(0, 2, 100), Load(1, 1, 100)]) == 1
    assert policy.choose(request(), "", [Load(0, 1, 100), Load(1, 1, 100)]) == 0


def test_a_worker_without_room_for_the_prompt_comes_last():
    policy = LeastLoaded()
    crowded, roomy = Load(0, 1, 100, free_tokens=2), Load(1, 9, 900, free_tokens=3)
    assert policy.choose(request(1, 2, 3), "", [crowded, roomy]) == 1
    assert policy.choose(request(1, 2), "", [crowded, roomy]) == 0
    assert policy.choose(request(1, 2, 3, 4), "", [crowded, roomy]) == 0, "neither has room"


def test_round_robin_takes_each_in_turn_and_skips_who_is_gone():
    policy = RoundRobin()
    three, two = loads(0, 0, 0), [Load(r, 0, 0) for r in (0, 2)]
    assert [policy.choose(request(), "", three) for _ in range(4)] == [0, 1, 2, 0]
    assert [policy.choose(request(), "", two) for _ in range(3)] == [2, 0, 2]


def test_a_prompt_goes_where_its_beginning_went():
    policy = Prefix(BLOCK)
    shared = [7] * 8
    assert policy.choose(request(*shared, 1), "", loads(0, 1)) == 0
    assert policy.choose(request(*shared, 2), "", loads(5, 0)) == 0
    assert policy.choose(request(*[8] * 9), "", loads(5, 0)) == 1, "nothing known: by load"
    assert policy.choose(request(*shared, 3, salt="tenant"), "", loads(5, 0)) == 1, "what it may not share"
    assert policy.choose(request(*shared, *[9] * 9), "", loads(5, 0)) == 1, "less than half of it"
    assert policy.choose(request(*shared, 4), "", loads(5, 0)) == 1, "now both know it: by load"


def test_a_worker_that_is_gone_takes_its_reputation_along():
    policy = Prefix(BLOCK)
    prompt = request(*[7] * 9)
    assert policy.choose(prompt, "", loads(0, 1)) == 0
    policy.forget(0)
    assert policy.choose(prompt, "", loads(5, 0)) == 1


def test_an_overloaded_favourite_loses_the_request():
    policy = Prefix(BLOCK)
    prompt = request(*[7] * 9)
    assert policy.choose(prompt, "", loads(0, 1)) == 0
    most = int(Prefix.OVERLOAD * 4 + Prefix.SLACK)
    assert policy.choose(prompt, "", loads(most, 4)) == 0
    assert policy.choose(prompt, "", loads(most + 1, 4)) == 1


def test_beside_an_idle_worker_a_favourite_keeps_up_to_its_slack_however_long_its_requests_are():
    policy = Prefix(BLOCK)
    prompt = request(*[7] * 9)
    assert policy.choose(prompt, "", loads(0, 1)) == 0
    long = [Load(0, Prefix.SLACK, 1_000_000, free_tokens=1), Load(1, 0, 0, free_tokens=1_000_000)]
    assert policy.choose(prompt, "", long) == 0, "1 token is new"
    assert policy.choose(prompt, "", loads(Prefix.SLACK + 1, 0)) == 1


def test_a_favourite_without_room_loses_the_request_to_one_that_has_it():
    policy = Prefix(BLOCK)
    prompt = request(*[7] * 9)
    assert policy.choose(prompt, "", loads(0, 1)) == 0
    assert policy.choose(prompt, "", [Load(0, 1, 9, free_tokens=1), Load(1, 0, 0, free_tokens=0)]) == 0, (
        "1 token is new"
    )
    assert policy.choose(prompt, "", [Load(0, 1, 9, free_tokens=0), Load(1, 0, 0, free_tokens=99)]) == 1


def test_what_a_worker_was_sent_long_ago_is_forgotten_its_end_first():
    policy = Prefix(BLOCK, memory=4)
    old = [7] * 8
    assert policy.choose(request(*old), "", loads(0, 1)) == 0
    assert policy.choose(request(*[8] * 12), "", loads(0, 1)) == 0
    assert policy.choose(request(*old[:4]), "", loads(1, 0)) == 0, "the first block is still known"
    assert policy.choose(request(*[9] * 16), "", loads(0, 1)) == 0
    assert policy.choose(request(*old), "", loads(1, 0)) == 1


def test_a_session_stays_where_it_is_at_every_router_and_only_moves_when_its_worker_goes():
    workers = loads(3, 0, 9, 1)
    names = [f"session {i}" for i in range(200)]
    chosen = {name: Session().choose(request(), name, workers) for name in names}
    assert set(chosen.values()) == {0, 1, 2, 3}
    assert all(Session().choose(request(), name, workers) == rank for name, rank in chosen.items())
    without = {name: Session().choose(request(), name, [workers[0], *workers[2:]]) for name in names}
    assert all(without[name] == rank for name, rank in chosen.items() if rank != 1)
    assert {without[name] for name, rank in chosen.items() if rank == 1} == {0, 2, 3}


def test_requests_of_no_session_go_by_load():
    assert Session().choose(request(), "", loads(3, 1, 2)) == 1


def test_an_unknown_policy_is_refused_with_the_choices():
    with pytest.raises(ConfigError, match=r"'best'.*least_loaded, round_robin"):
        create("best")


def test_the_deployment_file_knows_the_same_policies():
    assert set(get_args(PolicyName)) == set(POLICIES)
