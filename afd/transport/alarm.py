"""What a port sleeps by: rings from other threads, and descriptors where a link has nothing else."""

from __future__ import annotations

import queue
import selectors
from contextlib import suppress

from afd.transport.base import Link
from afd.transport.mailbox import Bell


class Alarm:
    """A flag that any thread may put up. One thread waits for it, silences it, and says what else is watched.

    Until a descriptor is watched, ringing and waiting go through a queue. That makes no system call while the
    interpreter is lent away, as a selector and a socket do: the ringing thread goes on at once, and the one that was
    rung for has its turn as soon as the other waits.
    """

    def __init__(self) -> None:
        self.ringing = False
        self._rings: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._bell: Bell | None = None  # rung instead, once there are descriptors
        self._selector: selectors.BaseSelector | None = None
        self._watched: set[Link] = set()

    def ring(self) -> None:
        if self.ringing:
            return
        self.ringing = True
        if self._bell is None:
            self._rings.put(None)
        else:
            self._bell.ring()

    def silence(self) -> None:
        """Whoever rang before this returns has done its work before: look for it afterwards."""
        if self._bell is not None and self._bell.ringing:
            self._bell.silence()
        while not self._rings.empty():
            self._rings.get()  # nobody else takes from it
        self.ringing = False

    def heard(self) -> bool:
        """Whether it rings or a descriptor is readable; never blocks."""
        return self.ringing or (self._selector is not None and bool(self._selector.select(0)))

    def wait(self, longest_s: float) -> None:
        """Sleeps until it rings or a descriptor is readable, or `longest_s` seconds; perhaps once more for a ring that
        was silenced already."""
        if self.ringing:
            return
        if self._selector is None:
            with suppress(queue.Empty):
                self._rings.get(timeout=longest_s)
            return
        for key, _ in self._selector.select(longest_s):
            if key.fileobj is self._bell and not self._bell.ringing:
                self._bell.silence()  # what is left of a ring that was answered already

    @property
    def shortest_s(self) -> float:
        """The kernel's wait for descriptors rounds up to whole milliseconds; a shorter one is polled away."""
        return 0.0 if self._selector is None else 1e-3

    def watch(self, link: Link) -> None:
        """Its descriptor, from now on."""
        if self._selector is None:
            self._selector, bell = selectors.DefaultSelector(), Bell()
            self._selector.register(bell, selectors.EVENT_READ)
            self._bell = bell
            if self.ringing:  # by a thread that saw no bell
                bell.ring()
        self._watched.add(link)
        self._selector.register(link, selectors.EVENT_READ)

    def unwatch(self, link: Link) -> None:
        """No more, if it was."""
        if self._selector is not None and link in self._watched:
            self._watched.remove(link)
            self._selector.unregister(link)

    def close(self) -> None:
        """Frees the descriptors; ringing it afterwards does nothing."""
        if self._selector is not None:
            self._selector.close()
        if self._bell is not None:
            self._bell.close()
