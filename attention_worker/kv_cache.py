"""The paged KV cache, and the view of it that one microbatch's step attends through."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from afd.layers.attention.base import AttentionBatch, PagedAttention
from afd.spec import ModelSpec
from attention_worker.scheduler import Batch


class KvCache:
    """Keys and values of every layer, each [num_blocks, block_size, kv_heads, head_dim]."""

    def __init__(
        self,
        spec: ModelSpec,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        kernel: PagedAttention,
    ) -> None:
        shape = (num_blocks, block_size, spec.attention.kv_heads, spec.attention.head_dim)
        # Not zeroed: memory is taken only when a block is first written, and kernels read no slot that was not.
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(spec.layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(spec.layers)]
        self.block_size = block_size
        self.device = device
        self.kernel = kernel

    def view(self, batch: Batch) -> PagedView:
        """What the tokens of `batch` attend through during one step."""
        return PagedView(
            self,
            AttentionBatch.build(
                query_lengths=[chunk.count for chunk in batch.chunks],
                context_lengths=[chunk.start + chunk.count for chunk in batch.chunks],
                block_tables=[chunk.sequence.block_table for chunk in batch.chunks],
                block_size=self.block_size,
                device=self.device,
            ),
        )


class PagedView:
    """A KvView (afd.models.halves) over the pages of one batch's sequences."""

    def __init__(self, cache: KvCache, batch: AttentionBatch) -> None:
        self._cache = cache
        self._batch = batch

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See KvView.attend."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        self._cache.kernel.store(keys, values, k, v, self._batch)
        return self._cache.kernel.attend(q, keys, values, self._batch, scale)


def positions(batch: Batch) -> list[int]:
    """The position of every token of `batch` in its own sequence."""
    return list(itertools.chain.from_iterable(range(c.start, c.start + c.count) for c in batch.chunks))
