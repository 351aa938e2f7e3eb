"""Shared memory between two processes of one host: one end of a connected socket and a mapped region.

For each microbatch the region has one slot for its dispatch and one for its combine, and for each direction a queue
(afd.transport.ring) that names the slots filled. The sender writes its tensors straight into the slot and enters it in
the queue; the receiver polls the queue and gets views of the slot. While both are awake no system call is made.

The socket is the doorbell: a packet of one byte for a receiver that said it sleeps. Its end says the peer is gone.

Where the processor does not order memory as polling needs it (afd.transport.ring.ORDERED), the doorbell rings for each
frame, and the receiver looks into the queue once for each ring.
"""

from __future__ import annotations

import mmap
import select
import socket
import time
from contextlib import suppress
from dataclasses import dataclass

from afd.errors import FrameError, PeerLost, PeerTimeout
from afd.transport import ring
from afd.transport.base import Hello, Link
from afd.transport.frame import Frame, Slot
from afd.transport.mailbox import again
from afd.transport.ring import Ring, ring_bytes

_ALIGNMENT = 64
_ROOM_MS = 1  # between two looks whether a full queue has room


@dataclass(frozen=True, slots=True)
class Region:
    """Where things lie: the queues of both directions, all dispatch slots, all combine slots."""

    microbatches: int
    dispatch_bytes: int
    combine_bytes: int
    queue_bytes: int

    @classmethod
    def of(cls, hello: Hello) -> Region:
        sizes = (hello.dispatch_bytes, hello.combine_bytes, ring_bytes(queue_capacity(hello.microbatches)))
        return cls(hello.microbatches, *[(n + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT for n in sizes])

    @property
    def total_bytes(self) -> int:
        return 2 * self.queue_bytes + self.microbatches * (self.dispatch_bytes + self.combine_bytes)

    def queue(self, memory: memoryview, number: int) -> Ring:
        """The queue of dispatches (0) or of combines (1)."""
        capacity = queue_capacity(self.microbatches)
        start = number * self.queue_bytes
        return Ring(memory[start : start + ring_bytes(capacity)], capacity)

    def slots(self, memory: memoryview, number: int) -> list[Slot]:
        """The slots of dispatches (0) or of combines (1), by microbatch."""
        size = self.combine_bytes if number else self.dispatch_bytes
        first = 2 * self.queue_bytes + number * self.microbatches * self.dispatch_bytes
        starts = [first + i * size for i in range(self.microbatches)]
        return [Slot(memory[start : start + size]) for start in starts]


def queue_capacity(microbatches: int) -> int:
    """Entries of a queue: honest peers have at most one frame a microbatch in it. Never more than a socket holds
    doorbells (some 270), so that ringing does not block."""
    return 2 * microbatches


class ShmLink(Link):
    """One end of a connected socket and a mapped region."""

    def __init__(
        self,
        peer: str,
        hello: Hello,
        sock: socket.socket,
        memory: mmap.mmap,
        *,
        attention_side: bool,
        deadline_s: float,
    ) -> None:
        self.peer, self.hello = peer, hello
        self.spins = ring.ORDERED
        self._sock = sock
        self._sock.setblocking(False)
        self._deadline_s = deadline_s
        self._end: PeerLost | None = None  # why the socket will never be readable again
        region = Region.of(hello)
        # The views keep the mapping alive, and with it every tensor handed out: it is unmapped with the last of them.
        whole = memoryview(memory)
        sent, received = (0, 1) if attention_side else (1, 0)
        self._send_slots, self._receive_slots = region.slots(whole, sent), region.slots(whole, received)
        self._outgoing, self._incoming = region.queue(whole, sent), region.queue(whole, received)

    def send(self, frame: Frame) -> None:
        assert 0 <= frame.microbatch < len(self._send_slots), (
            f"microbatch {frame.microbatch} has no slot; the link has {len(self._send_slots)}"
        )
        size = self._send_slots[frame.microbatch].write(frame)
        if not self._outgoing.put(frame.microbatch << 32 | size):
            self._wait_for_room(frame.microbatch << 32 | size)
        if self._outgoing.rouse() or not self.spins:
            self._ring()

    def _ring(self) -> None:
        try:
            self._sock.send(b"\0")
        except BlockingIOError:
            pass  # it is full of rings, any of which wakes the peer
        except OSError as error:
            raise self._lost(error) from error

    def _wait_for_room(self, entry: int) -> None:
        """Only a peer that reads none of its frames, or answers what it was not asked, lets a queue fill up."""
        until = time.monotonic() + self._deadline_s
        hang_up = select.poll()
        hang_up.register(self._sock, 0)
        while not self._outgoing.put(entry):
            if hang_up.poll(_ROOM_MS):
                raise self._lost(None)
            if time.monotonic() >= until:
                raise PeerTimeout(
                    f"{self.peer} has read none of its frames for {self._deadline_s:.3g} s (transport.deadline_s)",
                    peer=self.peer,
                )

    def poll(self) -> Frame | None:
        if not self.spins:
            return self.try_receive()
        entry = self._incoming.take()
        return None if entry is None else self._frame(entry)

    def try_receive(self) -> Frame | None:
        entry = self._after_each_ring() if not self.spins else self._incoming.take()
        if entry is None and self.spins:
            # In this order: a ring that is silenced here was for an entry that the second look finds.
            self._silence()
            self._incoming.doze()
            entry = self._incoming.take()
        if entry is not None:
            return self._frame(entry)
        if self._end is not None:
            raise again(self._end)
        return None

    def _after_each_ring(self) -> int | None:
        return self._incoming.take() if self._end is None and self._read_ring() else None

    def _silence(self) -> None:
        while self._end is None and self._read_ring():
            pass

    def _read_ring(self) -> bool:
        """Whether the doorbell rang. At the socket's end, notes why."""
        try:
            packet = self._read()
        except BlockingIOError:
            return False
        except OSError as error:
            self._end = self._lost(error)
            return False
        if not packet:
            self._end = self._lost(None)
            return False
        if len(packet) != 1:
            raise FrameError(f"{self.peer} sent a doorbell of more than one byte", peer=self.peer)
        return True

    def _read(self) -> bytes:
        try:
            return self._sock.recv(2)
        except ConnectionResetError:
            # The peer died without reading all of ours. What it sent before is still in the queue behind this error.
            return self._sock.recv(2)

    def _frame(self, entry: int) -> Frame:
        """What the peer entered in the queue."""
        self._incoming.awake()
        slot, size = entry >> 32, entry & 0xFFFFFFFF
        if slot >= len(self._receive_slots):
            raise FrameError(
                f"{self.peer} filled slot {slot}; the link has {len(self._receive_slots)} (attention.microbatches)",
                peer=self.peer,
            )
        frame = self._receive_slots[slot].read(size)
        if frame.microbatch != slot:
            raise FrameError(f"{self.peer} put microbatch {frame.microbatch} into slot {slot}", peer=self.peer)
        return frame

    def _lost(self, error: OSError | None) -> PeerLost:
        why = "it closed its end or died" if error is None else error.strerror or str(error)
        return PeerLost(f"{self.peer} is gone: {why}", peer=self.peer)

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        hang_up(self._sock)


def hang_up(sock: socket.socket) -> None:
    """Closes the connection even where a forked child still holds a copy of the descriptor."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
