"""The doors of one FFN worker, watched by a thread of their own.

So the port has nothing to wait for but its links, and asking for new peers is a look into a queue.
"""

from __future__ import annotations

import selectors
import threading
from collections.abc import Callable, Sequence

from afd.transport.base import Link, Listener
from afd.transport.mailbox import Bell, Mailbox

_LONGEST_SLEEP_S = 0.5  # then all listeners are asked: some show out clients that say nothing
_CLOSE_S = 1.0  # longest wait for the thread to end


class Doors:
    """Owns the listeners. `take` is for one thread, `close` for any."""

    def __init__(self, listeners: Sequence[Listener], ring: Callable[[], None]) -> None:
        """`ring` is called, in the doors' thread, when `take` has a link to give."""
        self._listeners = tuple(listeners)
        self._accepted: Mailbox[Link] = Mailbox()
        self._accepted.announce(ring)
        self._closing = Bell()
        self._thread = threading.Thread(target=self._watch, name="afd-doors", daemon=True)
        self._thread.start()

    def take(self) -> Link | None:
        """The next attention worker whose handshake was welcomed, if one is here; never blocks."""
        return self._accepted.poll()

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._closing, selectors.EVENT_READ)
            for listener in self._listeners:
                selector.register(listener, selectors.EVENT_READ)
            while not self._closing.ringing:
                for listener in self._listeners:
                    while (link := listener.try_accept()) is not None:
                        self._accepted.put(link)
                selector.select(_LONGEST_SLEEP_S)

    def close(self) -> None:
        """Closes the listeners, and the links that nobody took. Idempotent."""
        self._closing.ring()
        self._thread.join(_CLOSE_S)
        self._closing.close()
        for listener in self._listeners:
            listener.close()
        while (link := self._accepted.poll()) is not None:
            link.close()
