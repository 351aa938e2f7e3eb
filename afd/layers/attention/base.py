"""Paged attention: what a step's tokens look like to a kernel, and what every kernel does.

The cache of one layer is two tensors of num_blocks blocks, laid out by the kernel that reads them. A slot is a token's
place: block · block_size + offset. Blocks are handed out by the attention worker's block manager; kernels only read the
tables they are given. Slots that no table and length cover may hold anything, NaN included.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AttentionBatch:
    """The tokens of one step, sequence after sequence; the same for every layer, so kernels may key plans by it.

    Sequence s owns tokens query_starts[s] … query_starts[s+1] - 1, which are the last ones of its context. Lengths are
    also kept as Python integers, so that a kernel can plan without waiting for the device.
    """

    query_starts: Tensor  # [sequences + 1] int64, from 0
    context_lens: Tensor  # [sequences] int64, in tokens, this step's included
    block_tables: Tensor  # [sequences, most blocks] int64, padded with 0
    slots: Tensor  # [tokens] int64: where each token's k and v go
    positions: Tensor  # [tokens] int64: each token's place in its own sequence
    block_size: int  # tokens per block
    query_lengths: tuple[int, ...]  # this step's tokens per sequence
    context_lengths: tuple[int, ...]  # context_lens again

    @classmethod
    def build(
        cls,
        query_lengths: Sequence[int],
        context_lengths: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> AttentionBatch:
        """From plain integers, one entry per sequence; a table holds at least the blocks its context covers."""
        queries = np.asarray(query_lengths, dtype=np.int64)
        contexts = np.asarray(context_lengths, dtype=np.int64)
        assert (queries <= contexts).all(), f"queries {queries} are longer than their contexts {contexts}"
        tables = np.zeros((len(block_tables), max(map(len, block_tables), default=0)), dtype=np.int64)
        for row, blocks, context in zip(tables, block_tables, context_lengths, strict=True):
            assert len(blocks) * block_size >= context, (
                f"{len(blocks)} blocks of {block_size} cannot hold {context} tokens"
            )
            row[: len(blocks)] = blocks
        starts = np.concatenate(([0], np.cumsum(queries)))
        owner = np.repeat(np.arange(len(queries)), queries)  # [tokens]
        positions = np.arange(starts[-1]) - (starts[1:] - contexts)[owner]
        slots = tables[owner, positions // block_size] * block_size + positions % block_size
        return cls(
            query_starts=torch.from_numpy(starts).to(device),
            context_lens=torch.from_numpy(contexts).to(device),
            block_tables=torch.from_numpy(tables).to(device),
            slots=torch.from_numpy(slots).to(device),
            positions=torch.from_numpy(positions).to(device),
            block_size=block_size,
            query_lengths=tuple(query_lengths),
            context_lengths=tuple(context_lengths),
        )


class PagedAttention(Protocol):
    """One kernel. Used by one thread; keeps no reference to caches. Softmax is computed in float32."""

    def allocate(
        self, num_blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """One layer's keys and values, unwritten. Only this kernel knows how they lie inside a block."""
        ...

    def store(self, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, batch: AttentionBatch) -> None:
        """Writes k and v [tokens, kv_heads, head_dim] into the caches at batch.slots."""
        ...

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, scale: float) -> Tensor:
        """q [tokens, heads, head_dim], after `store` -> [tokens, heads, head_dim], same dtype. Each token sees its own
        sequence up to and including itself; query head h reads KV head h // (heads / kv_heads)."""
        ...


class PagedKv(Protocol):
    """The cache as a step's tokens see it, for layers that are computed as one call; see also KvView."""

    batch: AttentionBatch

    @property
    def native_step(self) -> Structure:
        """The batch as the compiled kernels take it (afd.native.library.CStep)."""
        ...

    def cache(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of `layer`, as the kernel allocated them."""
        ...
