"""Waiting for whichever of many links has a frame: first by polling, then asleep, until a deadline or a wake.

Polling sees a frame some 50 µs sooner than sleeping does, and takes a core away from whoever else could use it. So a
wait polls only where links say that it helps, no longer than transport.spin_us, and only while the last waits were
shorter than that.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager
from types import TracebackType

from afd.errors import TransportError
from afd.transport.alarm import Alarm
from afd.transport.base import Link
from afd.transport.frame import Frame

_LONGEST_SLEEP_S = 0.5  # then all links are asked again, whether or not something woke us
_LOOK_S = 5e-3  # a port that always finds frames looks this often for new peers and dead ones
_POLLS_PER_LOOK = (
    32  # while polling, between two looks at descriptors, which also lend the interpreter to other threads
)


class Patience:
    """How long the next wait should poll, from how long the last ones took."""

    _NEWEST = 0.25  # weight of the newest wait in the mean
    _LONGEST = 2.0  # a longer wait counts as this many spin times: it should not take long to be forgotten

    def __init__(self, spin_us: int) -> None:
        self._spin_s = spin_us / 1e6
        self._mean_s = 0.0

    @property
    def spin_s(self) -> float:
        """All of the spin time, or nothing."""
        return self._spin_s if self._mean_s <= self._spin_s else 0.0

    def waited(self, seconds: float) -> None:
        """The last wait took this long."""
        self._mean_s += self._NEWEST * (min(seconds, self._LONGEST * self._spin_s) - self._mean_s)


class Port(ABC):
    """One thread's view of many links. Only `wake` and `close` may be called from another thread, which is asserted."""

    def __init__(self, spin_us: int) -> None:
        self._patience = Patience(spin_us)
        self._alarm = Alarm()
        self._wake = False
        self._turn = threading.Lock()
        self._mine = _Turn(self)
        self._owner: int | None = None
        self._closed = False
        self._looked_s = 0.0

    def wake(self) -> None:
        """From any thread: the wait that is going on, or the next one, returns None."""
        self._wake = True
        self._alarm.ring()

    def close(self) -> None:
        """From any thread: ends every link. A wait that is going on returns None; later calls raise. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.wake()
        # Past a second the owner must be stuck in a send; closing its links under it is what ends that.
        taken = self._turn.acquire(timeout=1.0)
        self._close_all()
        self._alarm.close()
        if taken:
            self._turn.release()

    @abstractmethod
    def _links(self) -> Iterable[Link]:
        """All links that are alive."""

    @abstractmethod
    def _next(self, thoroughly: bool) -> Frame | None:
        """The next frame of any link, by asking (`try_receive`, new peers) or by polling alone."""

    @abstractmethod
    def _close_all(self) -> None: ...

    def _watch(self, link: Link) -> None:
        if not link.announce(self._alarm.ring):
            self._alarm.watch(link)

    def _forget(self, link: Link) -> None:
        if not self._closed:
            self._alarm.unwatch(link)
        link.close()

    def _wait(self, timeout_s: float, expecting: bool) -> Frame | None:
        """The next frame; None after `timeout_s` seconds or a wake. `expecting`: whether one should come soon."""
        start_s = time.monotonic()
        if start_s - self._looked_s >= _LOOK_S:
            frame = self._look()
            if frame is not None:
                return frame
        frame = self._next(thoroughly=False)
        if frame is not None or self._woken():
            return frame
        if timeout_s <= 0:
            return None
        frame = self._wait_long(start_s, start_s + timeout_s, expecting and any(link.spins for link in self._links()))
        self._patience.waited(time.monotonic() - start_s)
        return frame

    def _wait_long(self, start_s: float, until_s: float, spins: bool) -> Frame | None:
        spin_until_s = start_s + (self._patience.spin_s if spins else 0.0)
        polls = 0
        while True:
            now_s = time.monotonic()
            left_s = until_s - now_s
            if left_s <= 0:
                return None
            if now_s < spin_until_s or left_s < self._alarm.shortest_s:
                polls += 1
                look = not spins or polls % _POLLS_PER_LOOK == 0
                frame = self._look() if look else self._next(thoroughly=False)
            else:
                self._alarm.silence()
                frame = self._next(thoroughly=True)
                if frame is None and not self._wake:
                    self._alarm.wait(min(left_s, _LONGEST_SLEEP_S))
                    frame = self._next(thoroughly=False)
            if frame is not None or self._woken():
                return frame

    def _look(self) -> Frame | None:
        """The next frame, asked for only if something rang."""
        self._looked_s = time.monotonic()
        if not self._alarm.heard():
            return None
        self._alarm.silence()
        return self._next(thoroughly=True)

    def _woken(self) -> bool:
        if not self._wake:
            return False
        self._wake = False
        return True


class _Turn(AbstractContextManager[None]):
    """A port's calls, one at a time and by its owner. (Not a generator: those cost a microsecond more.)"""

    def __init__(self, port: Port) -> None:
        self._port = port

    def __enter__(self) -> None:
        port, me = self._port, threading.get_ident()
        assert port._closed or port._owner in (None, me), "a port belongs to one thread; others may wake and close it"
        port._turn.acquire()
        if port._closed:
            port._turn.release()
            raise TransportError("the port is closed")
        port._owner = me

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._port._turn.release()
