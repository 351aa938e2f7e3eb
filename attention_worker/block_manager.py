"""Hands out KV blocks, and remembers what computed ones hold. Knows block tables, names and integers, no tensors."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class BlockManager:
    """`num_blocks` blocks of `block_size` tokens each.

    A block is in use by one block table, or, once `publish` has given it a name (afd.token_blocks), read-only by
    several. A published block that nobody uses is free and still cached: `share` may revive it, until `grow` needs it
    for something else, the one least recently used first.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0, f"{num_blocks} KV blocks"
        self.num_blocks = num_blocks
        self.block_size = block_size
        # A stack: the block freed last is warm in the cache, and untouched memory stays untouched.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._users = [0] * num_blocks  # block tables that hold each block
        self._named: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}  # the same the other way round
        self._idle: OrderedDict[int, None] = OrderedDict()  # named and unused, least recently used first

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def missing(self, block_table: list[int], num_tokens: int) -> int:
        """How many more blocks `block_table` needs to hold `num_tokens` tokens."""
        return max(0, -(-num_tokens // self.block_size) - len(block_table))

    def cached(self, names: Sequence[bytes]) -> list[int]:
        """The blocks with the first of `names`, as far as there are any without a gap."""
        blocks = []
        for name in names:
            block = self._named.get(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def fits(self, shared: list[int], num_tokens: int) -> bool:
        """Whether a new block table that shares the blocks `shared` can grow to hold `num_tokens` tokens."""
        revived = sum(self._users[block] == 0 for block in shared)
        return self.missing(shared, num_tokens) + revived <= self.num_free

    def share(self, block_table: list[int], shared: list[int]) -> None:
        """Puts the `cached` blocks into an empty `block_table`, to be read only."""
        assert not block_table, "only a sequence that holds no blocks can share others'"
        for block in shared:
            if self._users[block] == 0:
                del self._idle[block]
            self._users[block] += 1
        block_table.extend(shared)

    def grow(self, block_table: list[int], num_tokens: int) -> bool:
        """Extends `block_table` to hold `num_tokens` tokens; False, and nothing changed, when too few are free."""
        missing = self.missing(block_table, num_tokens)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            block = self._free.pop() if self._free else self._evict()
            self._users[block] = 1
            block_table.append(block)
        return True

    def publish(self, block: int, name: bytes) -> None:
        """The KV of every token of `block`, which is in use, is computed: others may share it. Of several blocks with
        one name the first keeps it."""
        if self._named.setdefault(name, block) == block:
            self._names[block] = name

    def release(self, block_table: list[int]) -> None:
        """Takes every block of `block_table` back and empties it."""
        # The end first: a block is of no use without those before it, so it must not outlive them.
        for block in reversed(block_table):
            self._users[block] -= 1
            if self._users[block] == 0:
                if block in self._names:
                    self._idle[block] = None
                else:
                    self._free.append(block)
        block_table.clear()

    def check(self, block_tables: Iterable[list[int]]) -> None:
        """The invariants: every block is free, idle or in living tables; only named ones are in several or idle."""
        users = Counter(block for table in block_tables for block in table)
        found = sorted([*self._free, *self._idle, *users])
        assert found == list(range(self.num_blocks)), "a KV block is lost, or owned twice"
        assert all(users[block] == count for block, count in enumerate(self._users)), (
            "a KV block's users are miscounted"
        )
        assert all(block in self._names for block, count in users.items() if count > 1), (
            "a block without a name is shared"
        )
        assert all(block in self._names for block in self._idle), "a block without a name is cached"
        assert self._named == {name: block for block, name in self._names.items()}, "names and blocks do not agree"

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._named[self._names.pop(block)]
        return block
