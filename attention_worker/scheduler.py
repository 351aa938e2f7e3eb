"""Picks the sequences and tokens of one microbatch's next step. Continuous batching, chunked prefill, no tensors.

Sequences are not bound to a microbatch: at the end of its step a microbatch gives its members back and takes its
share (all runnable sequences over the number of microbatches) of those not in flight. So arrivals, departures and a
changed number of microbatches even out by themselves.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from attention_worker.block_manager import BlockManager
from attention_worker.chunking import ChunkBudget
from attention_worker.prefix_cache import PrefixCache
from attention_worker.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """`count` tokens of one sequence, from `start`: a decode is a chunk of one. `samples`: its last token's logits
    give the next token."""

    sequence: Sequence
    start: int
    count: int

    @property
    def is_decode(self) -> bool:
        return self.count == 1 and self.start >= len(self.sequence.request.prompt_token_ids)

    @property
    def samples(self) -> bool:
        return self.start + self.count == len(self.sequence.token_ids)

    @property
    def scores(self) -> range:
        """The positions in it whose logits score the token behind them: one of the prompt's, if that is asked for. What
        has a logprob already is not scored again, when it is computed again."""
        if self.sequence.is_scored:
            return range(0)
        scored, prompt = len(self.sequence.scored), len(self.sequence.request.prompt_token_ids)
        return range(max(self.start, scored - 1), min(self.start + self.count, prompt - 1))


@dataclass(frozen=True, slots=True)
class Batch:
    """What one microbatch computes in one step, begun at `began_s` on the scheduler's clock."""

    chunks: tuple[Chunk, ...]
    began_s: float = field(default_factory=time.monotonic)

    @property
    def num_tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of prompts: all but the decodes."""
        return sum(chunk.count for chunk in self.chunks if not chunk.is_decode)

    @property
    def decodes(self) -> bool:
        """Whether some request waits for this step to get its next token, and not its first."""
        return any(chunk.is_decode for chunk in self.chunks)


class Scheduler:
    """Waiting → running ⇄ in flight → gone. The most urgent first everywhere: by priority, then the oldest; the least
    urgent is preempted first.

    A waiting sequence is admitted when blocks for all of its tokens are free, so a prefill never stops half-way; a
    decode that finds no free block preempts the least urgent idle sequence, which will be recomputed. One whose next
    block is being computed by another (attention_worker.prefix_cache) lets others go first until it can share it.

    `microbatches` may be changed at any time. `target_s` is what a decode step may take when prompts ride along.
    `clock` gives the time in seconds: the machine's, or a simulation's.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        microbatches: int,
        max_batch_tokens: int,
        max_running: int,
        target_s: float | None = None,
        prefix_cache: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self.blocks = blocks
        self.prefixes = PrefixCache(blocks, enabled=prefix_cache)
        self.microbatches = microbatches
        self.max_batch_tokens = max_batch_tokens
        self.max_running = max_running
        self.waiting: list[Sequence] = []  # both are sorted, the most urgent first
        self.running: list[Sequence] = []  # holds blocks, in flight or not
        self.preemptions = 0
        self.chunks = ChunkBudget(max_batch_tokens, target_s)
        self._orders = 0
        # Who is admitted next and what it shares, looked up when needed: False after anything that may change it.
        self._next: tuple[Sequence, list[int]] | None = None
        self._next_is_known = False

    def add(self, sequence: Sequence) -> None:
        sequence.order = self._orders
        self._orders += 1
        insort(self.waiting, sequence, key=_urgency)
        self._next_is_known = False

    def has_work(self) -> bool:
        """Whether `schedule` may find something (it may still find too few free blocks)."""
        return any(not s.in_flight for s in self.running) or self._admissible() is not None

    def schedule(self) -> Batch | None:
        """The next step of one microbatch; its sequences are in flight until `complete` or `remove`."""
        share = -(-self._runnable() // self.microbatches)
        chunks: list[Chunk] = []
        idle = [s for s in self.running if not s.in_flight]
        decodes = [s for s in idle if s.num_pending == 1]
        # Requests in flight that have had a token wait for their next one, too.
        decoding = bool(decodes) or any(s.in_flight and s.num_generated for s in self.running)
        left = self._fill(decodes, chunks, share, self.max_batch_tokens)
        left = min(left, self.chunks.allowed(decoding))
        left = self._fill([s for s in idle if s.num_pending > 1], chunks, share, left)
        while len(chunks) < share and left > 0 and (admissible := self._admissible()):
            self._admit(*admissible)
            left -= self._take(admissible[0], left, chunks)
        return Batch(tuple(chunks), self._clock()) if chunks else None

    def complete(self, batch: Batch, now_s: float) -> None:
        """The KV of every chunk is computed; its sequences may be scheduled again."""
        if self.chunks.target_s is not None and batch.decodes:
            meanwhile = [s.num_pending for s in self.running if s.in_flight and s.num_pending > 1]
            self.chunks.observe(now_s - batch.began_s, min(self.chunks.tokens, max(meanwhile, default=0)))
        for chunk in batch.chunks:
            chunk.sequence.num_computed = chunk.start + chunk.count
            chunk.sequence.in_flight = False
            self.prefixes.computed(chunk.sequence)
        self._next_is_known = False

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence, wherever it is, and frees its blocks. It must not be computed any more."""
        self.blocks.release(sequence.block_table)
        self.prefixes.leave(sequence)
        sequence.in_flight = False
        self._next_is_known = False
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def all(self) -> Iterable[Sequence]:
        return [*self.running, *self.waiting]

    def check(self) -> None:
        """Invariants; for tests, and cheap enough to run when idle."""
        assert all(not s.block_table and not s.in_flight for s in self.waiting), "a waiting sequence holds blocks"
        assert all(queue == sorted(queue, key=_urgency) for queue in (self.waiting, self.running)), (
            "a queue is unsorted"
        )
        self.blocks.check(s.block_table for s in self.running)
        self.prefixes.check(self.running)

    def _runnable(self) -> int:
        """Running sequences, and the waiting ones that would find room now."""
        count, free = len(self.running), self.blocks.num_free
        for sequence in self.waiting[: self.max_running]:
            shared = self.prefixes.find(sequence)
            if shared is None:
                continue
            free -= self.blocks.missing(shared, len(sequence.token_ids))
            if free < 0 or count >= self.max_running:
                break
            count += 1
        return count

    def _admissible(self) -> tuple[Sequence, list[int]] | None:
        """The waiting sequence to admit now, and the blocks it shares: the first that does not wait for a prefix, among
        as many as could run. Nobody passes one that waits for room."""
        if not self._next_is_known:
            self._next, self._next_is_known = self._look_for_next(), True
        return self._next

    def _look_for_next(self) -> tuple[Sequence, list[int]] | None:
        if len(self.running) < self.max_running:
            for sequence in self.waiting[: self.max_running]:
                shared = self.prefixes.find(sequence)
                if shared is not None:
                    return (sequence, shared) if self.blocks.fits(shared, len(sequence.token_ids)) else None
        return None

    def _admit(self, sequence: Sequence, shared: list[int]) -> None:
        self.waiting.remove(sequence)
        self.prefixes.admit(sequence, shared)
        grown = self.blocks.grow(sequence.block_table, len(sequence.token_ids))
        assert grown, "an admissible sequence found no blocks"
        if sequence.scheduled_s is None:
            sequence.scheduled_s = self._clock()
        insort(self.running, sequence, key=_urgency)
        self._next_is_known = False

    def _fill(self, sequences: list[Sequence], chunks: list[Chunk], share: int, budget: int) -> int:
        """Takes running sequences into `chunks`; what is left of `budget` tokens."""
        for sequence in sequences:
            if len(chunks) == share or budget == 0:
                break
            # An earlier, older one may have preempted this one.
            if sequence.block_table and self._grow(sequence):
                budget -= self._take(sequence, budget, chunks)
        return budget

    def _take(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        count = min(sequence.num_pending, budget)
        chunks.append(Chunk(sequence, sequence.num_computed, count))
        sequence.in_flight = True
        return count

    def _grow(self, sequence: Sequence) -> bool:
        """Room for every token of `sequence`, if need be from the least urgent, which may be itself. One in flight is
        waited for: it can be preempted when its step is over."""
        self._next_is_known = False
        while not self.blocks.grow(sequence.block_table, len(sequence.token_ids)):
            last = self.running[-1]
            if last.in_flight:
                return False
            self._preempt(last)
            if last is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self.remove(sequence)
        insort(self.waiting, sequence, key=_urgency)


def _urgency(sequence: Sequence) -> tuple[int, bool, int]:
    return sequence.urgency
