"""Picks the sequences and tokens of one microbatch's next step. Continuous batching, chunked prefill, no tensors.

Sequences are not bound to a microbatch: at the end of its step a microbatch gives its members back and takes its
share (all runnable sequences over the number of microbatches) of those not in flight. So arrivals, departures and a
changed number of microbatches even out by themselves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from attention_worker.block_manager import BlockManager
from attention_worker.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """`count` tokens of one sequence, from `start`: a decode is a chunk of one. `samples`: its last token's logits
    give the next token."""

    sequence: Sequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        return self.start + self.count == len(self.sequence.token_ids)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one microbatch computes in one step."""

    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)


class Scheduler:
    """Waiting → running ⇄ in flight → gone. Oldest first everywhere; the youngest is preempted first.

    A waiting sequence is admitted when blocks for all of its tokens are free, so a prefill never stops half-way; a
    decode that finds no free block preempts the youngest idle sequence, which will be recomputed.
    """

    def __init__(self, blocks: BlockManager, *, microbatches: int, max_batch_tokens: int, max_running: int) -> None:
        self.blocks = blocks
        self.microbatches = microbatches
        self.max_batch_tokens = max_batch_tokens
        self.max_running = max_running
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # holds blocks, oldest first, in flight or not
        self.preemptions = 0
        self._orders = 0

    def add(self, sequence: Sequence) -> None:
        sequence.order = self._orders
        self._orders += 1
        self.waiting.append(sequence)

    def has_work(self) -> bool:
        """Whether `schedule` may find something (it may still find too few free blocks)."""
        return any(not s.in_flight for s in self.running) or self._admissible()

    def schedule(self) -> Batch | None:
        """The next step of one microbatch; its sequences are in flight until `complete` or `remove`."""
        share = -(-self._runnable() // self.microbatches)
        budget = self.max_batch_tokens
        chunks: list[Chunk] = []
        idle = [s for s in self.running if not s.in_flight]
        for sequence in [s for s in idle if s.num_pending == 1] + [s for s in idle if s.num_pending > 1]:
            if len(chunks) == share or budget == 0:
                break
            # An earlier, older one may have preempted this one.
            if sequence.block_table and self._grow(sequence):
                budget -= self._take(sequence, budget, chunks)
        while len(chunks) < share and budget > 0 and self._admissible():
            sequence = self.waiting.popleft()
            grown = self.blocks.grow(sequence.block_table, len(sequence.token_ids))
            assert grown, "an admissible sequence found no blocks"
            self.running.append(sequence)
            self.running.sort(key=lambda s: s.order)
            budget -= self._take(sequence, budget, chunks)
        return Batch(tuple(chunks)) if chunks else None

    def complete(self, batch: Batch) -> None:
        """The KV of every chunk is computed; its sequences may be scheduled again."""
        for chunk in batch.chunks:
            chunk.sequence.num_computed = chunk.start + chunk.count
            chunk.sequence.in_flight = False

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence, wherever it is, and frees its blocks. It must not be computed any more."""
        self.blocks.release(sequence.block_table)
        sequence.in_flight = False
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def all(self) -> Iterable[Sequence]:
        return [*self.running, *self.waiting]

    def check(self) -> None:
        """Invariants; for tests, and cheap enough to run when idle."""
        assert all(not s.block_table and not s.in_flight for s in self.waiting), "a waiting sequence holds blocks"
        self.blocks.check(s.block_table for s in self.running)

    def _runnable(self) -> int:
        """Running sequences, and the waiting ones that would find room now."""
        count, free = len(self.running), self.blocks.num_free
        for sequence in self.waiting:
            free -= self.blocks.missing(sequence.block_table, len(sequence.token_ids))
            if free < 0 or count >= self.max_running:
                break
            count += 1
        return count

    def _admissible(self) -> bool:
        if not self.waiting or len(self.running) >= self.max_running:
            return False
        head = self.waiting[0]
        return self.blocks.missing(head.block_table, len(head.token_ids)) <= self.blocks.num_free

    def _take(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        count = min(sequence.num_pending, budget)
        chunks.append(Chunk(sequence, sequence.num_computed, count))
        sequence.in_flight = True
        return count

    def _grow(self, sequence: Sequence) -> bool:
        """Room for every token of `sequence`, if need be from the youngest, which may be itself. A youngest one in
        flight is waited for: it can be preempted when its step is over."""
        while not self.blocks.grow(sequence.block_table, len(sequence.token_ids)):
            youngest = self.running[-1]
            if youngest.in_flight:
                return False
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self.remove(sequence)
        sequence.num_computed = 0
        self.waiting = deque(sorted([sequence, *self.waiting], key=lambda s: s.order))
