"""A queue of numbers in memory that two processes share: one writes, the other reads, and says when it sleeps.

Words of 8 bytes: 0 how many entries were ever written; 8 how many were ever read; 9 the reader's nap, odd while it
sleeps; from 16 on the entries, in turn. Words 0-7 are the writer's cache line, 8-15 the reader's.

Why no wake-up is lost (x86-64). The writer stores an entry, stores the count, fences, loads the nap; the reader stores
the nap, fences, loads the count. A processor may let a load pass an older store to another address, but not pass a
fence; so of the two loads at least one sees the other side's store: either the reader finds the entry, or the writer
finds the reader asleep and rings. Stores are seen in their order and loads are done in theirs, so whoever sees the
count also sees the entry, and the payload that was written before it. All words are aligned, and read and written by
single instructions. The fence is a lock's acquire: a locked compare-and-exchange, which on x86-64 orders everything.
On other processors nothing of this is promised; see `ORDERED`.
"""

from __future__ import annotations

import platform
import threading

from afd.errors import FrameError

# Whether this processor orders memory as the queue needs it when nothing but the queue is looked at. Where it does not,
# a reader may look only after a system call has told it of each entry.
ORDERED = platform.machine() in ("x86_64", "AMD64")

_READ, _NAP, _ENTRIES = 8, 9, 16
WORD_BYTES = 8


def ring_bytes(capacity: int) -> int:
    """Bytes of a ring for `capacity` entries."""
    return WORD_BYTES * (_ENTRIES + capacity)


class Ring:
    """One side's view. A side calls either `put` and `rouse`, or `take`, `doze` and `awake`, from one thread.

    Nothing that the other side writes is trusted: `take` raises FrameError for a count that cannot be.
    """

    def __init__(self, memory: memoryview, capacity: int) -> None:
        """`memory` has ring_bytes(capacity) bytes, zeros at first, aligned to 64."""
        self._words = memory.cast("Q")
        assert len(self._words) == _ENTRIES + capacity, f"{memory.nbytes} bytes are no ring of {capacity}"
        self.capacity = capacity
        self._done = 0  # entries this side has written, or read
        self._nap = 0  # the reader: its nap; the writer: the last nap it ended
        self._lock = threading.Lock()

    # ---- the writer -----------------------------------------------------------------------------------------------

    def put(self, entry: int) -> bool:
        """Appends `entry` (below 2**64); False when there is no room."""
        words = self._words
        if self._done - words[_READ] >= self.capacity:
            return False
        words[_ENTRIES + self._done % self.capacity] = entry
        self._done += 1
        words[0] = self._done
        return True

    def rouse(self) -> bool:
        """After `put`: whether the reader sleeps and was not roused in this nap yet. The caller must then wake it."""
        self._fence()
        nap = self._words[_NAP]
        if nap % 2 == 0 or nap == self._nap:
            return False
        self._nap = nap
        return True

    # ---- the reader -----------------------------------------------------------------------------------------------

    def take(self) -> int | None:
        """The oldest entry; None when there is none."""
        words = self._words
        waiting = words[0] - self._done
        if not waiting:
            return None
        if not 0 < waiting <= self.capacity:
            raise FrameError(f"a queue of {self.capacity} entries claims to hold {waiting}")
        entry = words[_ENTRIES + self._done % self.capacity]
        self._done += 1
        words[_READ] = self._done
        return entry

    def doze(self) -> None:
        """From now on the writer wakes this side. `take` once more before sleeping: it sees what came until here."""
        if self._nap % 2 == 0:
            self._nap += 1
            self._words[_NAP] = self._nap
        self._fence()

    def awake(self) -> None:
        """The writer need not wake this side any more."""
        if self._nap % 2:
            self._nap += 1
            self._words[_NAP] = self._nap

    def _fence(self) -> None:
        self._lock.acquire()
        self._lock.release()
