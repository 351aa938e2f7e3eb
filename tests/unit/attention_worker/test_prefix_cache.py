"""The prefix cache: shared blocks hold what they are taken for, whoever comes, goes, is preempted or cancelled."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from afd.token_blocks import extend_names
from afd.types import GenerateRequest, SampledToken, SamplingParams
from attention_worker.block_manager import BlockManager
from attention_worker.scheduler import Batch, Scheduler
from attention_worker.sequence import Sequence

SIZE = 4


def names_of(tokens: list[int], salt: str = "") -> list[bytes]:
    names: list[bytes] = []
    extend_names(names, tokens, SIZE, salt)
    return names


def sequence(name: str, tokens: list[int], max_tokens: int = 4, **more: object) -> Sequence:
    request = GenerateRequest(name, tuple(tokens), SamplingParams(max_tokens=max_tokens, ignore_eos=True))
    return Sequence(replace(request, **more), 0, 10_000)  # type: ignore[arg-type]


def scheduler(blocks: int = 64, microbatches: int = 1, budget: int = 64, *, prefix_cache: bool = True) -> Scheduler:
    return Scheduler(
        BlockManager(blocks, SIZE),
        microbatches=microbatches,
        max_batch_tokens=budget,
        max_running=64,
        prefix_cache=prefix_cache,
    )


def step(sched: Scheduler) -> dict[str, tuple[int, int]]:
    """One whole step; what of each sequence it computed, as (start, count)."""
    batch = sched.schedule()
    if batch is None:
        return {}
    finish(sched, batch)
    return {chunk.sequence.request.request_id: (chunk.start, chunk.count) for chunk in batch.chunks}


def finish(sched: Scheduler, batch: Batch) -> None:
    sched.complete(batch, batch.began_s)
    for chunk in batch.chunks:
        if chunk.samples and chunk.sequence.append(SampledToken(7), ()).finish_reason:
            sched.remove(chunk.sequence)


# ---- names ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), max_size=20), st.lists(st.integers(0, 3), max_size=20), st.integers(0, 20))
def test_names_are_equal_exactly_as_far_as_the_tokens_are(one: list[int], other: list[int], cut: int) -> None:
    names: list[bytes] = []
    extend_names(names, one[:cut], SIZE)
    extend_names(names, one, SIZE)
    assert names == names_of(one), "naming in two goes gives other names"
    for i, (a, b) in enumerate(zip(names, names_of(other), strict=False), 1):
        assert (a == b) == (one[: i * SIZE] == other[: i * SIZE])


def test_a_salt_gives_names_of_its_own() -> None:
    assert not set(names_of([1] * 8)) & set(names_of([1] * 8, "tenant"))


# ---- the block manager against a model -----------------------------------------------------------------------------


class Blocks(RuleBasedStateMachine):
    """The model: what each block holds, which tables hold it, and a list of the unused in the order they became so."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(8, SIZE)
        self.tables: list[tuple[list[int], list[int], int]] = []  # block table, tokens, blocks that are published
        self.holds: dict[int, bytes] = {}  # the KV written into each block
        self.known: dict[bytes, int] = {}  # the block that was published first with a name
        self.unused: list[int] = []  # published blocks, the first to go first

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=24))
    def admit(self, tokens: list[int]) -> None:
        names = names_of(tokens)
        names = names[: (len(tokens) - 1) // SIZE]
        shared = self.manager.cached(names)
        assert len(shared) == next((i for i, name in enumerate(names) if name not in self.known), len(names))
        assert [self.holds[block] for block in shared] == names[: len(shared)], (
            "a block does not hold what it is said to"
        )
        fits = self.manager.fits(shared, len(tokens))
        free = self.manager.num_free - sum(block in self.unused for block in shared)
        assert fits == (-(-len(tokens) // SIZE) - len(shared) <= free)
        if not fits:
            return
        table: list[int] = []
        self.manager.share(table, shared)
        self.unused = [block for block in self.unused if block not in shared]
        assert self.manager.grow(table, len(tokens))
        in_use = {block for other, _, _ in self.tables for block in other} | set(shared)
        for block in table[len(shared) :]:
            assert block not in in_use, "a block in use was given away"
            if block in self.unused:
                assert self.unused.pop(0) == block, "not the one least recently used went first"
                del self.known[self.holds[block]]
            self.holds.pop(block, None)
        self.tables.append((table, tokens, len(shared)))

    @rule(pick=st.randoms(use_true_random=False))
    def compute_a_block(self, pick: random.Random) -> None:
        candidates = [i for i, (_, tokens, done) in enumerate(self.tables) if done < len(tokens) // SIZE]
        if candidates:
            index = pick.choice(candidates)
            table, tokens, done = self.tables[index]
            self.holds[table[done]] = names_of(tokens)[done]
            self.known.setdefault(names_of(tokens)[done], table[done])
            self.manager.publish(table[done], names_of(tokens)[done])
            self.tables[index] = (table, tokens, done + 1)

    @rule(pick=st.randoms(use_true_random=False))
    def release(self, pick: random.Random) -> None:
        if self.tables:
            table, _, _ = self.tables.pop(pick.randrange(len(self.tables)))
            blocks = list(table)
            self.manager.release(table)
            in_use = {block for other, _, _ in self.tables for block in other}
            known = [block for block in reversed(blocks) if block in self.known.values()]
            self.unused += [block for block in known if block not in in_use]

    @invariant()
    def holds_together(self) -> None:
        self.manager.check(table for table, _, _ in self.tables)
        in_use = {block for table, _, _ in self.tables for block in table}
        assert self.manager.num_used == len(in_use)


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


# ---- the scheduler -------------------------------------------------------------------------------------------------


def test_a_later_prompt_computes_only_what_it_does_not_share() -> None:
    sched = scheduler()
    sched.add(sequence("first", [1] * 10, max_tokens=1))
    assert step(sched) == {"first": (0, 10)}
    second = sequence("second", [1] * 9 + [2] * 4)
    sched.add(second)
    assert step(sched) == {"second": (8, 5)}
    assert second.num_cached == 8
    assert (sched.prefixes.queries, sched.prefixes.hits) == (23, 8)
    sched.check()


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    sched = scheduler()
    for name, computed in (("first", (0, 8)), ("again", (4, 4))):
        sched.add(sequence(name, [1] * 8, max_tokens=1))
        assert step(sched) == {name: computed}


def test_an_answer_is_shared_too_by_the_prompt_that_goes_on_from_it() -> None:
    sched = scheduler()
    sched.add(first := sequence("first", [1] * 6, max_tokens=7))
    while step(sched):
        pass
    sched.add(sequence("second", [*first.token_ids, 5]))
    assert step(sched) == {"second": (12, 2)}


def test_the_first_output_says_how_much_was_cached() -> None:
    sched = scheduler()
    sched.add(sequence("first", [1] * 10, max_tokens=1))
    step(sched)
    sched.add(second := sequence("second", [1] * 10))
    assert sched.schedule()
    assert second.append(SampledToken(7), ()).cached_tokens == 8
    assert second.append(SampledToken(7), ()).cached_tokens == 0


def test_who_comes_at_once_with_the_same_beginning_waits_for_the_first_and_lets_others_pass() -> None:
    sched = scheduler(budget=8)
    for i in range(3):
        sched.add(sequence(f"same {i}", [1] * 16 + [i]))
    sched.add(sequence("other", [9] * 3))
    assert step(sched) == {"same 0": (0, 8)}
    assert step(sched) == {"same 0": (8, 8)}
    assert step(sched) == {"same 0": (16, 1), "same 1": (16, 1), "same 2": (16, 1), "other": (0, 3)}
    sched.check()


def test_others_go_on_while_a_prefix_is_in_flight() -> None:
    sched = scheduler(microbatches=2, budget=8)
    sched.add(sequence("same 0", [1] * 16))
    sched.add(sequence("same 1", [1] * 16))
    sched.add(sequence("other", [9] * 3))
    first, second = sched.schedule(), sched.schedule()
    assert first is not None
    assert second is not None
    assert [[c.sequence.request.request_id for c in batch.chunks] for batch in (first, second)] == [
        ["same 0"],
        ["other"],
    ]
    assert not sched.has_work()
    assert sched.schedule() is None


def test_when_the_one_that_is_waited_for_goes_the_next_computes_it() -> None:
    sched = scheduler(budget=8)
    first, second = sequence("first", [1] * 16), sequence("second", [1] * 16)
    sched.add(first)
    sched.add(second)
    assert step(sched) == {"first": (0, 8)}
    sched.remove(first)
    assert step(sched) == {"second": (8, 8)}
    sched.check()


def test_a_block_is_not_shared_before_its_step_is_complete() -> None:
    sched = scheduler()
    sched.add(sequence("first", [1] * 9))
    batch = sched.schedule()
    assert batch is not None
    sched.add(sequence("second", [1] * 9))
    assert sched.schedule() is None
    finish(sched, batch)
    assert step(sched) == {"first": (9, 1), "second": (8, 1)}


def test_a_preempted_sequence_finds_what_nobody_needed_meanwhile() -> None:
    sched = scheduler(blocks=5)
    old, young = sequence("old", [1] * 8, 8), sequence("young", [2] * 8, 8)
    sched.add(old)
    sched.add(young)
    while not sched.preemptions:
        step(sched)
    sched.remove(old)
    assert step(sched)["young"][0] > 0
    assert young.num_cached == 0, "what it computed itself is no hit"
    assert sched.prefixes.hits == 0
    sched.check()


def test_salts_keep_prompts_apart_and_the_switch_turns_it_off() -> None:
    sched = scheduler()
    for salt in ("a", "b", "a"):
        sched.add(sequence(salt, [1] * 9, 1, cache_salt=salt))
    assert step(sched) == {"a": (0, 9), "b": (0, 9)}
    assert step(sched) == {"a": (8, 1)}
    off = scheduler(prefix_cache=False)
    for _ in range(2):
        off.add(sequence("same", [1] * 9, 1))
        assert step(off) == {"same": (0, 9)}


def test_lower_priority_numbers_go_first_and_lose_their_blocks_last() -> None:
    sched = scheduler(blocks=4, budget=8)
    first, urgent, late = (
        sequence("first", [1] * 8, 8),
        sequence("urgent", [2] * 8, 8, priority=-1),
        sequence("late", [3] * 8, 8, priority=5),
    )
    for each in (late, first, urgent):
        sched.add(each)
    assert step(sched) == {"urgent": (0, 8)}
    assert step(sched) == {"urgent": (8, 1)}, "no room for a third block of `first`'s prompt, and nobody passes it"
    assert sched.waiting == [first, late]


def test_the_least_urgent_is_preempted_though_it_is_the_oldest() -> None:
    sched = scheduler(blocks=4)
    sched.add(old := sequence("old", [1] * 8, 8, priority=1))
    sched.add(young := sequence("young", [2] * 8, 8))
    step(sched)
    assert step(sched) == {"young": (8, 1)}
    assert sched.waiting == [old]
    assert sched.running == [young]


@pytest.mark.parametrize("prefix_cache", [True, False])
@settings(max_examples=120, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 24), st.integers(1, 3), st.integers(1, 9), st.integers(-1, 1)),
        min_size=1,
        max_size=16,
    ),
    st.integers(1, 3),
    st.integers(10, 40),
    st.integers(1, 40),
    st.randoms(use_true_random=False),
)
def test_under_random_load_every_table_holds_its_own_tokens(
    prefix_cache: bool,
    sizes: list[tuple[int, int, int, int, int]],
    microbatches: int,
    blocks: int,
    budget: int,
    rng: random.Random,
) -> None:
    """Prompts share beginnings of three kinds; some are cancelled, idle or in flight. Every computed token is written
    down with its block, so a block that is given to somebody else, or shared too early, shows."""
    sched = scheduler(blocks, microbatches, budget, prefix_cache=prefix_cache)
    todo = [
        sequence(str(i), [kind] * shared + [10 + i] * own, answer, priority=priority)
        for i, (kind, shared, own, answer, priority) in enumerate(sizes)
        if shared + own + answer <= blocks * SIZE
    ]
    kv: dict[tuple[int, int], list[int]] = {}  # what was written at each place: all tokens up to it
    in_flight: list[Batch] = []
    cancelled: set[Sequence] = set()
    for _ in range(10_000):
        if todo and rng.random() < 0.5:
            sched.add(todo.pop())
        if (living := list(sched.all())) and rng.random() < 0.05:
            victim = rng.choice(living)
            cancelled.add(victim)
            if not victim.in_flight:
                sched.remove(victim)
        if len(in_flight) < microbatches and (batch := sched.schedule()):
            in_flight.append(batch)
        elif in_flight:
            batch = in_flight.pop(rng.randrange(len(in_flight)))
            for chunk in batch.chunks:
                for at in range(chunk.start, chunk.start + chunk.count):
                    place = chunk.sequence.block_table[at // SIZE], at % SIZE
                    kv[place] = chunk.sequence.token_ids[: at + 1]
                for at in range(chunk.start + chunk.count):
                    place = chunk.sequence.block_table[at // SIZE], at % SIZE
                    assert kv[place] == chunk.sequence.token_ids[: at + 1], "attends to somebody else's KV"
            finish(sched, batch)
            for chunk in batch.chunks:
                if chunk.sequence in cancelled:
                    sched.remove(chunk.sequence)
        else:
            assert not list(sched.all()), "nothing in flight, yet nothing could be scheduled"
            if not todo:
                break
        sched.check()
    else:
        raise AssertionError("the load never ended")
    assert sched.blocks.num_used == 0


def test_a_more_urgent_request_does_not_wait_for_a_less_urgent_one_to_compute_its_prefix() -> None:
    sched = scheduler(budget=SIZE)
    prompt = list(range(3 * SIZE))
    slow, urgent = sequence("slow", [*prompt, 1], priority=5), sequence("urgent", [*prompt, 2], priority=-5)
    sched.add(slow)
    assert set(step(sched)) == {"slow"}  # it has promised all three blocks, and computed one
    sched.add(urgent)
    assert sched.prefixes.find(urgent) == slow.block_table[:1]
    patient = sequence("patient", [*prompt, 3], priority=7)
    assert sched.prefixes.find(patient) is None
    while sched.has_work():
        step(sched)
        sched.check()
