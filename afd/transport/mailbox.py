"""A queue between threads of one process that a selector can wait on, and the bell it rings."""

from __future__ import annotations

import selectors
import socket
import threading
from collections import deque
from typing import Generic, TypeVar

from afd.errors import TransportError

T = TypeVar("T")


def wait_readable(fd: int, timeout_s: float) -> bool:
    """Sleeps until `fd` is readable; False after `timeout_s` seconds."""
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        return bool(selector.select(max(0.0, timeout_s)))


class Bell:
    """A flag with a file descriptor, readable while the flag is up. Any thread may call anything."""

    def __init__(self) -> None:
        self.ringing = False
        self._closed = False
        self._lock = threading.Lock()
        self._reader, self._writer = socket.socketpair()

    def ring(self) -> None:
        with self._lock:
            if not self.ringing and not self._closed:
                self._writer.send(b"\0")
            self.ringing = True

    def silence(self) -> None:
        with self._lock:
            if self.ringing and not self._closed:
                self._reader.recv(1)
            self.ringing = False

    def fileno(self) -> int:
        return self._reader.fileno()

    def close(self) -> None:
        """Idempotent; ringing it afterwards does nothing."""
        with self._lock:
            self._closed = True
            self._reader.close()
            self._writer.close()


class Mailbox(Generic[T]):
    """What other threads put, one thread takes, in order; readable while `take` has anything to say."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._end: TransportError | None = None
        self._lock = threading.Lock()
        self._bell = Bell()

    def put(self, item: T) -> bool:
        """False after `end`: the item is not taken."""
        with self._lock:
            if self._end is not None:
                return False
            self._items.append(item)
            self._bell.ring()
            return True

    def end(self, error: TransportError) -> None:
        """Nothing comes after this: once all items are taken, `take` raises `error`. The first end counts."""
        with self._lock:
            if self._end is None:
                self._end = error
                self._bell.ring()

    @property
    def ended(self) -> bool:
        return self._end is not None

    def take(self) -> T | None:
        """The oldest item, or None; never blocks. Raises what `end` was given once all items are taken."""
        if not self._items and self._end is None:
            return None
        with self._lock:
            if self._items:
                item = self._items.popleft()
                if not self._items and self._end is None:
                    self._bell.silence()
                return item
            if self._end is not None:
                raise again(self._end)
            return None

    def fileno(self) -> int:
        return self._bell.fileno()

    def close(self) -> None:
        """Frees the descriptor. Idempotent."""
        self._bell.close()


def again(error: TransportError) -> TransportError:
    """The same error to raise once more (one object raised often would drag its tracebacks along)."""
    return type(error)(str(error), peer=error.peer)
