"""The mailbox's descriptor tells the truth."""

from __future__ import annotations

import threading

import pytest

from afd.errors import FrameError, PeerLost
from afd.transport.mailbox import Bell, Mailbox, wait_readable


def test_a_mailbox_is_readable_exactly_while_it_has_something_to_say() -> None:
    box: Mailbox[int] = Mailbox()
    assert box.take() is None
    assert not wait_readable(box.fileno(), 0)
    assert box.put(1)
    assert box.put(2)
    for expected in (1, 2):
        assert wait_readable(box.fileno(), 0)
        assert box.take() == expected
    assert not wait_readable(box.fileno(), 0)
    box.close()


def test_the_end_comes_after_all_items_and_keeps_coming() -> None:
    box: Mailbox[int] = Mailbox()
    box.put(1)
    box.end(PeerLost("gone", peer="ffn_rank 1"))
    box.end(FrameError("a later end does not count"))
    assert not box.put(2)
    assert box.take() == 1
    for _ in range(2):
        assert wait_readable(box.fileno(), 0)
        with pytest.raises(PeerLost, match="gone") as caught:
            box.take()
        assert caught.value.peer == "ffn_rank 1"
    box.close()
    box.close()


def test_items_of_many_threads_all_arrive() -> None:
    box: Mailbox[int] = Mailbox()
    threads = [threading.Thread(target=lambda: [box.put(i) for i in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    taken: list[int] = []
    while len(taken) < 800:
        assert wait_readable(box.fileno(), 10)
        item = box.take()
        assert item is not None
        taken.append(item)
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(list(range(200)) * 4)
    assert not wait_readable(box.fileno(), 0)
    box.close()


def test_a_mailbox_that_announces_calls_for_what_is_here_what_comes_and_the_end() -> None:
    box: Mailbox[int] = Mailbox()
    calls: list[int] = []
    box.put(1)
    box.announce(lambda: calls.append(1))
    assert len(calls) == 1
    box.put(2)
    assert len(calls) == 2
    box.end(PeerLost("gone"))
    assert len(calls) == 3
    assert [box.take(), box.take()] == [1, 2]
    with pytest.raises(PeerLost, match="gone"):
        box.take()
    box.close()


def test_a_bell_rung_often_is_silent_after_one_silence() -> None:
    bell = Bell()
    for _ in range(100_000):
        bell.ring()
    assert wait_readable(bell.fileno(), 0)
    bell.silence()
    assert not bell.ringing
    assert not wait_readable(bell.fileno(), 0)
    bell.silence()
    bell.close()
    bell.ring()
