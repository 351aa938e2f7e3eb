"""The batcher joins what is ready, waits briefly for those who are about to come, and never for the dead."""

from __future__ import annotations

from ffn_worker.batcher import Batcher, Item

WINDOW = 0.001


def item(attention_rank: int, layer: int, at: float, microbatch: int = 0) -> Item[str]:
    return Item(attention_rank, microbatch, layer, at, f"{attention_rank}.{microbatch}")


def batcher() -> Batcher[str]:
    return Batcher(num_layers=4, gather_window_s=WINDOW)


def rhythm(b: Batcher[str], attention_rank: int, layers: int, start: float, turnaround: float) -> float:
    """Lets one stream go through `layers` layers alone; returns when the last was answered."""
    now = start
    for layer in range(layers):
        b.add(item(attention_rank, layer % 4, now))
        group = b.next(now + WINDOW)
        assert [i.attention_rank for i in group] == [attention_rank]
        b.answered(group, now)
        now += turnaround
    return now - turnaround


def test_the_oldest_items_layer_goes_first_with_all_ready_items_of_it() -> None:
    b = batcher()
    b.add(item(0, 2, 1.0))
    b.add(item(1, 3, 1.1))
    b.add(item(2, 2, 1.2))
    b.add(item(0, 2, 1.3, microbatch=1))
    assert [i.payload for i in b.next(2.0)] == ["0.0", "2.0", "0.1"]
    assert [i.payload for i in b.next(2.0)] == ["1.0"]
    assert b.next(2.0) == []
    assert b.patience_s(2.0) is None


def test_a_worker_whose_rhythm_says_it_is_about_to_send_this_layer_is_waited_for() -> None:
    b = batcher()
    answered = rhythm(b, 1, 3, 0.0, turnaround=0.0100)  # layers 0, 1, 2: next is 3, 10 ms after the last answer
    b.add(item(0, 3, answered + 0.0095))
    assert b.next(answered + 0.0096) == []
    patience = b.patience_s(answered + 0.0096)
    assert patience is not None
    assert 0 < patience <= WINDOW
    b.add(item(1, 3, answered + 0.0100))
    assert [i.attention_rank for i in b.next(answered + 0.0100)] == [0, 1]


def test_the_wait_ends_with_the_window_when_the_expected_worker_does_not_come() -> None:
    b = batcher()
    answered = rhythm(b, 1, 3, 0.0, turnaround=0.010)
    b.add(item(0, 3, answered + 0.0095))
    assert b.next(answered + 0.0095 + WINDOW / 2) == []
    assert [i.attention_rank for i in b.next(answered + 0.0095 + WINDOW * 1.01)] == [0]


def test_an_idle_or_dead_worker_is_never_waited_for() -> None:
    b = batcher()
    answered = rhythm(b, 1, 3, 0.0, turnaround=0.010)
    b.add(item(0, 3, answered + 5.0))
    assert [i.attention_rank for i in b.next(answered + 5.0)] == [0]


def test_a_worker_expected_at_another_layer_or_too_late_is_not_waited_for() -> None:
    b = batcher()
    answered = rhythm(b, 1, 2, 0.0, turnaround=0.010)  # next is layer 2
    b.add(item(0, 3, answered + 0.0095))
    assert b.next(answered + 0.0095) != []
    b = batcher()
    answered = rhythm(b, 1, 3, 0.0, turnaround=0.010)
    b.add(item(0, 3, answered + 0.002))  # 8 ms before the other: far outside the window
    assert b.next(answered + 0.002) != []


def test_one_attention_workers_microbatches_do_not_wait_for_one_another() -> None:
    b = batcher()
    answered = rhythm(b, 0, 3, 0.0, turnaround=0.010)
    b.add(item(0, 3, answered + 0.0095, microbatch=1))
    assert b.next(answered + 0.0095) != []


def test_what_a_disconnected_worker_sent_is_forgotten() -> None:
    b = batcher()
    b.add(item(0, 1, 1.0))
    b.add(item(1, 1, 1.0))
    b.keep(frozenset({1}))
    assert [i.attention_rank for i in b.next(2.0)] == [1]
