"""An alarm misses no ring, whether it sleeps in a queue or on descriptors."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import pytest

from afd.errors import PeerLost
from afd.transport.alarm import Alarm
from afd.transport.base import Link, Listener
from afd.transport.doors import Doors
from afd.transport.mailbox import Mailbox

LONG_S = 10.0
SOON_S = 2.0


class Descriptor:
    """As much of a link as an alarm looks at."""

    def __init__(self) -> None:
        self.box: Mailbox[int] = Mailbox()

    def fileno(self) -> int:
        return self.box.fileno()


@contextmanager
def alarms(watching: bool) -> Iterator[tuple[Alarm, Descriptor]]:
    alarm, link = Alarm(), Descriptor()
    if watching:
        alarm.watch(cast(Link, link))
    try:
        yield alarm, link
    finally:
        alarm.close()
        link.box.close()


@pytest.mark.parametrize("watching", [False, True])
def test_no_ring_of_many_threads_is_missed(watching: bool) -> None:
    items: list[int] = []
    with alarms(watching) as (alarm, _):

        def work() -> None:
            for i in range(500):
                items.append(i)
                alarm.ring()

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        seen, start = 0, time.monotonic()
        while seen < 2000:
            alarm.silence()
            if len(items) == seen:
                alarm.wait(LONG_S)  # a missed ring would sleep this long
            seen = len(items)
        assert time.monotonic() - start < SOON_S
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("watching", [False, True])
def test_a_silent_alarm_sleeps_until_its_time(watching: bool) -> None:
    with alarms(watching) as (alarm, _):
        alarm.ring()
        assert alarm.heard()
        alarm.silence()
        assert not alarm.heard()
        start = time.monotonic()
        alarm.wait(0.05)
        assert time.monotonic() - start >= 0.04


def test_a_ring_before_the_first_descriptor_is_heard_after_it() -> None:
    with alarms(False) as (alarm, link):
        alarm.ring()
        alarm.watch(cast(Link, link))
        assert alarm.heard()
        alarm.silence()
        start = time.monotonic()
        link.box.put(1)
        alarm.wait(LONG_S)
        assert time.monotonic() - start < SOON_S
        alarm.unwatch(cast(Link, link))
        alarm.silence()
        assert not alarm.heard()


class Door(Listener):
    """A listener whose links are put into it."""

    address = ""

    def __init__(self) -> None:
        self.box: Mailbox[Link] = Mailbox()

    def try_accept(self) -> Link | None:
        return self.box.take()

    def fileno(self) -> int:
        return self.box.fileno()

    def close(self) -> None:
        self.box.end(PeerLost("closed"))
        self.box.close()


class Guest:
    closed = False

    def close(self) -> None:
        self.closed = True


def test_doors_ring_for_a_guest_and_show_out_whom_nobody_took() -> None:
    door, rang = Door(), threading.Semaphore(0)
    doors = Doors([door], rang.release)
    first, second = Guest(), Guest()
    for guest in (first, second):
        door.box.put(cast(Link, guest))
        assert rang.acquire(timeout=LONG_S)
    assert cast(Guest, doors.take()) is first
    doors.close()
    doors.close()
    assert second.closed
    assert not first.closed
    assert doors.take() is None
