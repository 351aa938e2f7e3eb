"""Decides which ready dispatches the FFN worker computes together, and how long it waits for more. No tensors.

The oldest item's layer goes next, with every ready item of that layer. It may wait for a stream (one microbatch of
one attention worker) that is about to send the same layer, but only when that stream's own rhythm says that it will
be here inside the gather window. So idle, slow or dead workers are never waited for, and a single attention worker
never waits for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

# Weight of the newest turnaround in a stream's running mean.
SMOOTHING = 0.3


@dataclass(frozen=True, slots=True)
class Item(Generic[T]):
    """One ready dispatch; `payload` is the caller's own. Times in seconds of one monotonic clock."""

    attention_rank: int
    microbatch: int
    layer: int
    arrived_s: float
    payload: T


@dataclass(slots=True)
class _Stream:
    """What is known of one microbatch of one attention worker: when it was last answered, for which layer, and how
    long it usually takes from an answer to its next dispatch."""

    ready: bool = False
    layer: int = 0
    answered_s: float = 0.0
    turnaround_s: float | None = None


@dataclass(slots=True)
class Batcher(Generic[T]):
    """`num_layers` closes the circle: after the last layer a stream sends layer 0."""

    num_layers: int
    gather_window_s: float
    _ready: list[Item[T]] = field(default_factory=list)
    _streams: dict[tuple[int, int], _Stream] = field(default_factory=dict)

    def add(self, item: Item[T]) -> None:
        """A dispatch has arrived."""
        stream = self._streams.setdefault((item.attention_rank, item.microbatch), _Stream())
        if stream.answered_s:
            took = item.arrived_s - stream.answered_s
            old = stream.turnaround_s
            stream.turnaround_s = took if old is None else old + SMOOTHING * (took - old)
        stream.ready = True
        self._ready.append(item)

    def next(self, now_s: float) -> list[Item[T]]:
        """The items to compute together now; empty when there are none, or waiting is still worth it."""
        if not self._ready or now_s < self._wait_until():
            return []
        layer = self._oldest.layer
        group = [item for item in self._ready if item.layer == layer]
        self._ready = [item for item in self._ready if item.layer != layer]
        return group

    def answered(self, items: Sequence[Item[T]], now_s: float) -> None:
        """Their combines are sent: the streams' turnaround starts."""
        for item in items:
            stream = self._streams.get((item.attention_rank, item.microbatch))
            if stream is not None:
                stream.ready, stream.layer, stream.answered_s = False, item.layer, now_s

    def patience_s(self, now_s: float) -> float | None:
        """Seconds until `next` gives a group without further arrivals; None when nothing is ready."""
        return max(0.0, self._wait_until() - now_s) if self._ready else None

    def keep(self, attention_ranks: frozenset[int]) -> None:
        """Forgets every stream and item of attention workers that are not connected any more."""
        self._ready = [item for item in self._ready if item.attention_rank in attention_ranks]
        self._streams = {key: s for key, s in self._streams.items() if key[0] in attention_ranks}

    @property
    def _oldest(self) -> Item[T]:
        return min(self._ready, key=lambda item: item.arrived_s)

    def _wait_until(self) -> float:
        """The moment by which everybody worth waiting for should be here; the oldest's arrival if there is nobody."""
        oldest = self._oldest
        earliest, limit = oldest.arrived_s - self.gather_window_s, oldest.arrived_s + self.gather_window_s
        here = {item.attention_rank for item in self._ready if item.layer == oldest.layer}
        before = (oldest.layer - 1) % self.num_layers
        # Overdue by more than the window is idle, gone or frozen; its rhythm says whether to wait, not until when.
        expected = any(
            attention_rank not in here
            and not stream.ready
            and stream.layer == before
            and stream.turnaround_s is not None
            and earliest <= stream.answered_s + stream.turnaround_s <= limit
            for (attention_rank, _), stream in self._streams.items()
        )
        return limit if expected else oldest.arrived_s
