"""The scheduler and block manager under random load: nothing starves, nothing leaks, nobody is computed twice."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.types import GenerateRequest, SampledToken, SamplingParams
from attention_worker.block_manager import BlockManager
from attention_worker.scheduler import Batch, Scheduler
from attention_worker.sequence import Sequence

numbers = itertools.count()


def sequence(name: str, prompt: int, max_tokens: int, max_context: int = 10_000) -> Sequence:
    """Its prompt has nothing in common with others', so that all of it is computed."""
    request = GenerateRequest(name, (next(numbers),) * prompt, SamplingParams(max_tokens=max_tokens))
    return Sequence(request, 0, max_context)


def scheduler(
    blocks: int = 64, block_size: int = 4, microbatches: int = 1, budget: int = 64, running: int = 64
) -> Scheduler:
    return Scheduler(
        BlockManager(blocks, block_size), microbatches=microbatches, max_batch_tokens=budget, max_running=running
    )


def finish_step(sched: Scheduler, batch: Batch) -> None:
    """What the engine does at the end of a step, with made-up tokens."""
    sched.complete(batch, now_s=batch.began_s)
    for chunk in batch.chunks:
        if chunk.samples and chunk.sequence.append(SampledToken(7), ()).finish_reason:
            sched.remove(chunk.sequence)


def test_a_long_prompt_is_computed_in_chunks_beside_decodes() -> None:
    sched = scheduler(budget=10)
    short, long = sequence("short", 3, 5), sequence("long", 25, 1)
    sched.add(short)
    sched.add(long)
    first = sched.schedule()
    assert first is not None
    assert [(c.sequence, c.start, c.count, c.samples) for c in first.chunks] == [
        (short, 0, 3, True),
        (long, 0, 7, False),
    ]
    finish_step(sched, first)
    second = sched.schedule()
    assert second is not None
    assert [(c.sequence, c.start, c.count) for c in second.chunks] == [(short, 3, 1), (long, 7, 9)]
    finish_step(sched, second)
    third = sched.schedule()
    assert third is not None
    assert [(c.count, c.samples) for c in third.chunks] == [(1, True), (9, True)]


def test_a_waiting_request_is_admitted_only_when_all_its_tokens_find_room() -> None:
    sched = scheduler(blocks=5, block_size=4)
    first, second = sequence("first", 12, 4), sequence("second", 12, 4)
    sched.add(first)
    sched.add(second)
    batch = sched.schedule()
    assert batch is not None
    assert [c.sequence for c in batch.chunks] == [first]
    assert sched.schedule() is None
    finish_step(sched, batch)
    sched.remove(first)
    batch = sched.schedule()
    assert batch is not None
    assert [c.sequence for c in batch.chunks] == [second]


def test_the_youngest_is_preempted_and_computed_again_from_its_start() -> None:
    sched = scheduler(blocks=4, block_size=4)
    old, young = sequence("old", 8, 8), sequence("young", 8, 8)
    sched.add(old)
    sched.add(young)
    batch = sched.schedule()
    assert batch is not None
    finish_step(sched, batch)
    batch = sched.schedule()  # both need a third block; there is none
    assert batch is not None
    assert [c.sequence for c in batch.chunks] == [old]
    assert list(sched.waiting) == [young]
    assert sched.preemptions == 1
    assert young.num_computed == 0
    assert young.num_pending == 9
    sched.check()


def test_the_oldest_waits_for_a_younger_one_in_flight_rather_than_lose_its_own_blocks() -> None:
    sched = scheduler(blocks=4, block_size=4, microbatches=2, budget=8)
    old, young = sequence("old", 8, 8), sequence("young", 8, 8)
    sched.add(old)
    sched.add(young)
    first, second = sched.schedule(), sched.schedule()
    assert first is not None
    assert second is not None
    finish_step(sched, first)  # now `old` wants a third block, there is none, and `young` is in flight
    assert sched.schedule() is None
    assert old in sched.running
    assert sched.preemptions == 0
    finish_step(sched, second)
    third = sched.schedule()
    assert third is not None
    assert [c.sequence for c in third.chunks] == [old]
    assert list(sched.waiting) == [young]
    sched.check()


def test_microbatches_share_the_running_sequences_evenly() -> None:
    sched = scheduler(blocks=1000, microbatches=3, budget=512)
    for i in range(10):
        sched.add(sequence(str(i), 4, 4))
    sizes = [len(batch.chunks) for _ in range(3) if (batch := sched.schedule())]
    assert sizes == [4, 4, 2]


def test_requests_without_room_do_not_swell_a_microbatchs_share() -> None:
    sched = scheduler(blocks=6, block_size=4, microbatches=3)
    for i in range(3):
        sched.add(sequence(str(i), 6, 2))
    for i in range(50):
        sched.add(sequence(f"later {i}", 20, 2))
    assert [len(batch.chunks) for _ in range(3) if (batch := sched.schedule())] == [1, 1, 1]


def test_a_lost_block_is_noticed() -> None:
    blocks = BlockManager(3, 2)
    table: list[int] = []
    assert blocks.grow(table, 3)
    assert not blocks.grow([], 3)
    blocks.check([table])
    with pytest.raises(AssertionError, match="lost"):
        blocks.check([table[:1]])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=20),
    st.integers(1, 4),
    st.integers(11, 40),
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(1, 10),
    st.integers(0, 2**32),
)
def test_every_request_ends_with_all_its_tokens_and_no_block_stays_in_use(
    sizes: list[tuple[int, int]],
    microbatches: int,
    blocks: int,
    block_size: int,
    budget: int,
    running: int,
    seed: int,
) -> None:
    sched = scheduler(blocks, block_size, microbatches, budget, running)
    rng = random.Random(seed)
    room = blocks * block_size
    todo = [sequence(str(i), p, m, room) for i, (p, m) in enumerate(sizes) if p < room]
    everyone = list(todo)
    in_flight: list[Batch] = []
    for _ in range(10_000):
        if todo and rng.random() < 0.5:
            sched.add(todo.pop())
        if len(in_flight) < microbatches and (batch := sched.schedule()):
            assert 0 < batch.num_tokens <= budget
            assert len({id(c.sequence) for b in [*in_flight, batch] for c in b.chunks}) == sum(
                len(b.chunks) for b in [*in_flight, batch]
            ), "a sequence is in two microbatches"
            assert all(len(c.sequence.block_table) * block_size >= c.start + c.count for c in batch.chunks)
            in_flight.append(batch)
        elif in_flight:
            finish_step(sched, in_flight.pop(rng.randrange(len(in_flight))))
        else:
            assert not list(sched.all()), "nothing in flight, yet nothing could be scheduled"
            if not todo:
                break
        sched.check()
    else:
        raise AssertionError("the load never ended")
    assert sched.blocks.num_used == 0
    for s in everyone:
        assert s.num_generated == min(s.request.sampling.max_tokens, room - len(s.request.prompt_token_ids))
