"""Prompts that begin alike are computed once. Decides what a sequence shares, waits for and leaves behind. No tensors.

Only full blocks are shared, so none is ever written by two sequences, and never the block with a sequence's last token,
whose logits give the next one. A block is shared once its KV is computed. Until then it is promised by the sequence
that computes it, and a newcomer that needs it next waits for it, unless it is the more urgent of the two: prompts are
computed in order of urgency, so it would hardly start earlier with one of its own.
"""

from __future__ import annotations

from collections.abc import Iterable

from afd.token_blocks import extend_names
from attention_worker.block_manager import BlockManager
from attention_worker.sequence import Sequence


class PrefixCache:
    """`queries` and `hits` count tokens of sequences when first admitted: all, and those found computed."""

    def __init__(self, blocks: BlockManager, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self.queries = 0
        self.hits = 0
        self._blocks = blocks
        self._promised: dict[bytes, Sequence] = {}  # by the sequence that computes it

    def find(self, sequence: Sequence) -> list[int] | None:
        """The blocks that a waiting `sequence` can share now; None: it should wait for more."""
        if not self.enabled or not sequence.is_scored:  # who wants its prompt's logprobs has to compute the prompt
            return []
        self._name(sequence)
        names = sequence.block_names[: (len(sequence.token_ids) - 1) // self._blocks.block_size]
        shared = self._blocks.cached(names)
        promiser = self._promised.get(names[len(shared)]) if len(shared) < len(names) else None
        return None if promiser is not None and promiser.urgency < sequence.urgency else shared

    def admit(self, sequence: Sequence, shared: list[int]) -> None:
        """`sequence` runs from now on, and shares the blocks it was told to `find`: their KV counts as computed."""
        self._blocks.share(sequence.block_table, shared)
        sequence.num_published = len(shared)
        sequence.num_computed = len(shared) * self._blocks.block_size
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
            self.queries += len(sequence.token_ids)
            self.hits += sequence.num_computed
        sequence.num_promised = len(sequence.block_names)
        for name in sequence.block_names[len(shared) :]:
            self._promised.setdefault(name, sequence)

    def computed(self, sequence: Sequence) -> None:
        """More of `sequence` has been computed: its newly full blocks can be shared."""
        full = sequence.num_computed // self._blocks.block_size
        if not self.enabled or full <= sequence.num_published:
            return
        self._name(sequence)
        for i in range(sequence.num_published, full):
            self._blocks.publish(sequence.block_table[i], sequence.block_names[i])
            self._promised.pop(sequence.block_names[i], None)
        sequence.num_published = full

    def leave(self, sequence: Sequence) -> None:
        """`sequence` holds its blocks no longer, and does not compute what it promised."""
        for name in sequence.block_names[sequence.num_published : sequence.num_promised]:
            if self._promised.get(name) is sequence:
                del self._promised[name]
        sequence.num_published = sequence.num_promised = sequence.num_computed = 0

    def check(self, running: Iterable[Sequence]) -> None:
        """The invariant: what is promised, a running sequence is going to compute."""
        coming = {(name, s.order) for s in running for name in s.block_names[s.num_published : s.num_promised]}
        assert all((name, s.order) in coming for name, s in self._promised.items()), "a promised block never comes"

    def _name(self, sequence: Sequence) -> None:
        extend_names(sequence.block_names, sequence.token_ids, self._blocks.block_size, sequence.request.cache_salt)
