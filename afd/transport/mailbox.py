"""A queue between threads of one process, and the bell it rings, which a selector can wait on."""

from __future__ import annotations

import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

from afd.errors import TransportError

T = TypeVar("T")


def wait_readable(fd: int, timeout_s: float) -> bool:
    """Sleeps until `fd` is readable; False after `timeout_s` seconds."""
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        return bool(selector.select(max(0.0, timeout_s)))


class Bell:
    """A flag with a file descriptor, readable while the flag is up. Any thread may ring; one waits and silences.

    Silencing takes no lock that ringing holds: a system call lends the interpreter to other threads, and the thread
    that was just rung for would wait for the ringing one to get its turn again. The price: the descriptor may become
    readable once more for a ring that was silenced already.
    """

    def __init__(self) -> None:
        self.ringing = False
        self._closed = False
        self._lock = threading.Lock()  # of ringing and closing: a closed descriptor's number may be somebody else's
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)

    def ring(self) -> None:
        if self.ringing:
            return
        self.ringing = True
        with self._lock:
            if not self._closed:
                self._writer.send(b"\0")

    def silence(self) -> None:
        """Whoever put the flag up before this returns has done its work before: look for it afterwards."""
        with suppress(OSError):
            while len(self._reader.recv(_RINGS)) == _RINGS:
                pass
        self.ringing = False

    def fileno(self) -> int:
        return self._reader.fileno()

    def close(self) -> None:
        """Idempotent; ringing it afterwards does nothing."""
        with self._lock:
            self._closed = True
            self._reader.close()
            self._writer.close()


_RINGS = 64  # read at once; there are hardly ever more than two


class Mailbox(Generic[T]):
    """What other threads put, one thread takes, in order; readable while `take` has anything to say (and perhaps once
    more, see Bell), until `announce` is called."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._end: TransportError | None = None
        self._lock = threading.Lock()  # of putting and ending
        self._bell: Bell | None = Bell()
        self._ring = self._bell.ring

    def announce(self, ring: Callable[[], None]) -> None:
        """From now on `ring` is called, by the thread that puts or ends, and there is no descriptor any more."""
        bell, self._bell, self._ring = self._bell, None, ring
        if bell is not None:
            bell.close()
        if self._items or self._end is not None:
            ring()

    def put(self, item: T) -> bool:
        """False after `end`: the item is not taken."""
        with self._lock:
            if self._end is not None:
                return False
            self._items.append(item)
        self._ring()
        return True

    def end(self, error: TransportError) -> None:
        """Nothing comes after this: once all items are taken, `take` raises `error`. The first end counts."""
        with self._lock:
            if self._end is not None:
                return
            self._end = error
        self._ring()

    @property
    def ended(self) -> bool:
        return self._end is not None

    def take(self) -> T | None:
        """The oldest item, or None; never blocks. Raises what `end` was given once all items are taken."""
        item = self.poll()
        if self._bell is not None and not self._items and self._end is None:
            self._bell.silence()
            if self._items or self._end is not None:  # it came meanwhile
                self._bell.ring()
        if item is None and self._end is not None:
            item = self.poll()
            if item is None:
                raise again(self._end)
        return item

    def poll(self) -> T | None:
        """The oldest item, or None, and nothing else: the descriptor may stay readable, the end is not told."""
        try:
            return self._items.popleft()
        except IndexError:
            return None

    def fileno(self) -> int:
        assert self._bell is not None, "a mailbox that calls somebody has no descriptor"
        return self._bell.fileno()

    def close(self) -> None:
        """Frees the descriptor. Idempotent."""
        if self._bell is not None:
            self._bell.close()


def again(error: TransportError) -> TransportError:
    """The same error to raise once more (one object raised often would drag its tracebacks along)."""
    return type(error)(str(error), peer=error.peer)


def named(error: TransportError, peer: str) -> TransportError:
    """The error with its peer, in the sentence too."""
    text = str(error)
    return type(error)(text if peer in text else f"{peer}: {text}", peer=peer)
