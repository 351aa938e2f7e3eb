"""Hands out KV blocks. Knows sequences' block tables and integers, no tensors."""

from __future__ import annotations

from collections.abc import Iterable


class BlockManager:
    """`num_blocks` blocks of `block_size` tokens each. A block belongs to one block table at a time."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0, f"{num_blocks} KV blocks"
        self.num_blocks = num_blocks
        self.block_size = block_size
        # A stack: the block freed last is warm in the cache, and untouched memory stays untouched.
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def missing(self, block_table: list[int], num_tokens: int) -> int:
        """How many more blocks `block_table` needs to hold `num_tokens` tokens."""
        return max(0, -(-num_tokens // self.block_size) - len(block_table))

    def grow(self, block_table: list[int], num_tokens: int) -> bool:
        """Extends `block_table` to hold `num_tokens` tokens; False, and nothing changed, when too few are free."""
        missing = self.missing(block_table, num_tokens)
        if missing > len(self._free):
            return False
        block_table.extend(self._free.pop() for _ in range(missing))
        return True

    def release(self, block_table: list[int]) -> None:
        """Takes every block of `block_table` back and empties it."""
        self._free.extend(reversed(block_table))
        block_table.clear()

    def check(self, block_tables: Iterable[list[int]]) -> None:
        """The invariant: free blocks and all living tables together are every block, once each."""
        seen = sorted(self._free + [block for table in block_tables for block in table])
        assert seen == list(range(self.num_blocks)), "a KV block is lost, or owned twice"
