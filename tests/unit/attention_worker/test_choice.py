"""Which microbatch the engine goes on with, case by case."""

from __future__ import annotations

from dataclasses import dataclass

from attention_worker.choice import choose, has_room


@dataclass
class One:
    """A microbatch as far as the choice goes."""

    batch: str | None = "a step"
    answers: tuple[int, ...] = ()
    paused: bool = False
    sent_at: float = 0.0


def chosen(*microbatches: One, may_begin: bool = True) -> One | None:
    return choose(microbatches, 2, lambda: may_begin)


def test_an_idle_one_goes_first_so_that_the_pipeline_fills() -> None:
    idle, answered = One(batch=None), One(answers=(0, 1))
    assert chosen(answered, idle) is idle
    assert chosen(answered, idle, may_begin=False) is answered


def test_the_oldest_answered_one_goes_next_and_half_an_answer_is_none() -> None:
    older, newer = One(answers=(0, 1), sent_at=1.0), One(answers=(0, 1), sent_at=2.0)
    assert chosen(newer, older) is older
    assert chosen(One(answers=(0,))) is None


def test_a_paused_one_waits_for_answered_ones_until_the_ffn_side_has_enough_to_do() -> None:
    paused, answered, sent = One(paused=True), One(answers=(0, 1)), One()
    assert chosen(paused, sent) is paused
    assert chosen(paused, answered, sent) is answered
    assert chosen(paused, answered, sent, One()) is paused


def test_there_is_room_while_fewer_are_under_way_than_wanted() -> None:
    assert has_room([One(), One(batch=None)], 2)
    assert not has_room([One(), One(batch=None)], 1)
