"""Both ends in one process: for debugging, for tests, and for trying what a bad network does (Faults).

Frames are encoded and decoded as on any wire, so neither end ever sees the other's tensors, only copies.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import random
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from afd.errors import PeerLost
from afd.transport.base import Hello, Link, Listener
from afd.transport.frame import Frame, decode, encode
from afd.transport.handshake import answer, check_welcome, hello_packet
from afd.transport.mailbox import Mailbox

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong with the frames that one side sends; the default is nothing.

    delay_s: each frame waits a random time up to this many seconds. drop: probability that a frame vanishes. reorder:
    delayed frames may overtake each other. cut_after: the link is cut instead of sending frame number cut_after
    (from 0). seed: the same seed gives the same faults on the same link.
    """

    delay_s: float = 0.0
    drop: float = 0.0
    reorder: bool = False
    cut_after: int | None = None
    seed: int = 0


class LocalListener(Listener):
    """The door of one FFN worker; `address` is its name among the doors of this process."""

    def __init__(self, expected: Hello, faults: Faults | None) -> None:
        self.expected = expected
        self.address = f"{os.getpid()}-{secrets.token_hex(8)}"
        self.faults = faults
        self.accepted: Mailbox[Link] = Mailbox()
        with _doors_lock:
            _doors[self.address] = self

    def try_accept(self) -> Link | None:
        return self.accepted.take()

    def fileno(self) -> int:
        return self.accepted.fileno()

    def close(self) -> None:
        with _doors_lock:
            _doors.pop(self.address, None)
        while not self.accepted.ended and (link := self.accepted.take()) is not None:
            link.close()
        self.accepted.end(PeerLost("the door is closed"))
        self.accepted.close()


_doors: dict[str, LocalListener] = {}
_doors_lock = threading.Lock()


def listen(expected: Hello, faults: Faults | None = None) -> LocalListener:
    """A door in this process. `faults` happen to the frames its links send."""
    return LocalListener(expected, faults)


def has_door(address: str) -> bool:
    """Whether an FFN worker of this very process listens under `address`."""
    return address in _doors


def dial(address: str, hello: Hello, faults: Faults | None = None) -> Link:
    """Connects to the door named `address`; never blocks. Raises PeerLost when there is none, HandshakeRefused."""
    us, them = f"attention_rank {hello.attention_rank}", f"ffn_rank {hello.ffn_rank}"
    door = _doors.get(address)
    if door is None:
        raise PeerLost(f"{them} does not listen in this process (name {address!r})", peer=them)
    agreed, welcome = answer(door.expected, hello_packet(hello))
    check_welcome(welcome, them)
    assert agreed is not None, "a welcome comes with what was agreed"
    to_ffn: Mailbox[bytearray] = Mailbox()
    to_attention: Mailbox[bytearray] = Mailbox()
    link = LocalLink(us, them, hello, hello.combine_bytes, to_attention, to_ffn, faults)
    door.accepted.put(LocalLink(them, us, agreed, hello.dispatch_bytes, to_ffn, to_attention, door.faults))
    return link


class LocalLink(Link):
    """One end: takes from `inbox`, puts into the other end's."""

    def __init__(
        self,
        us: str,
        peer: str,
        hello: Hello,
        max_bytes: int,
        inbox: Mailbox[bytearray],
        outbox: Mailbox[bytearray],
        faults: Faults | None,
    ) -> None:
        self.us, self.peer, self.hello = us, peer, hello
        self._max_bytes = max_bytes
        self._inbox, self._outbox = inbox, outbox
        self._faults = faults or Faults()
        self._random = random.Random(f"{self._faults.seed} {us} {peer}")
        self._sent = 0
        self._postman = _Postman(self._faults.reorder, outbox.put) if self._faults.delay_s else None

    def send(self, frame: Frame) -> None:
        if self._inbox.ended or self._outbox.ended:
            raise PeerLost(f"{self.peer} is gone", peer=self.peer)
        if self._sent == self._faults.cut_after:
            self.cut()
            raise PeerLost(f"{self.peer} is gone: the link was cut after {self._sent} frames", peer=self.peer)
        self._sent += 1
        if self._random.random() < self._faults.drop:
            return
        packet = bytearray().join(encode(frame))
        if self._postman:
            self._postman.carry(packet, self._random.uniform(0, self._faults.delay_s))
        else:
            self._outbox.put(packet)

    def try_receive(self) -> Frame | None:
        packet = self._inbox.take()
        return None if packet is None else decode(packet, self._max_bytes)

    def poll(self) -> Frame | None:
        packet = self._inbox.poll()
        return None if packet is None else decode(packet, self._max_bytes)

    def cut(self) -> None:
        """Ends both directions; either end then sees PeerLost."""
        if self._postman:
            self._postman.close()
        self._outbox.end(PeerLost(f"{self.us} is gone: its link was closed", peer=self.us))
        self._inbox.end(PeerLost(f"{self.peer} is gone: its link was closed", peer=self.peer))

    def fileno(self) -> int:
        return self._inbox.fileno()

    def announce(self, ring: Callable[[], None]) -> bool:
        self._inbox.announce(ring)
        return True

    def close(self) -> None:
        self.cut()
        self._inbox.close()


class _Postman:
    """Delivers packets after their delay, from a thread of its own."""

    def __init__(self, reorder: bool, deliver: Callable[[bytearray], object]) -> None:
        self._reorder = reorder
        self._deliver = deliver
        self._bag: list[tuple[float, int, bytearray]] = []  # (due, tie-break, packet), a heap
        self._numbers = itertools.count()
        self._last_due = 0.0
        self._closed = False
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="afd-postman", daemon=True).start()

    def carry(self, packet: bytearray, delay_s: float) -> None:
        with self._changed:
            due = time.monotonic() + delay_s
            if not self._reorder:
                due = self._last_due = max(due, self._last_due)
            heapq.heappush(self._bag, (due, next(self._numbers), packet))
            self._changed.notify()

    def close(self) -> None:
        """Packets still in the bag are lost."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (not self._bag or self._bag[0][0] > time.monotonic()):
                    self._changed.wait(self._bag[0][0] - time.monotonic() if self._bag else None)
                if self._closed:
                    return
                packet = heapq.heappop(self._bag)[2]
            self._deliver(packet)
