"""The paged KV cache, and the view of it that one microbatch's step attends through."""

from __future__ import annotations

from ctypes import Structure

import torch
from torch import Tensor

from afd.layers.attention.base import AttentionBatch, PagedAttention
from afd.native.attention import NativeAttention
from afd.spec import ModelSpec
from attention_worker.scheduler import Batch


class KvCache:
    """Keys and values of every layer, as `kernel` lays them out."""

    def __init__(
        self,
        spec: ModelSpec,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        kernel: PagedAttention,
    ) -> None:
        heads, dim = spec.attention.kv_heads, spec.attention.head_dim
        # Not zeroed: memory is taken only when a block is first written, and kernels read no slot that was not.
        self.layers = [kernel.allocate(num_blocks, block_size, heads, dim, dtype, device) for _ in range(spec.layers)]
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
    """A KvView (afd.models.halves) over the pages of one batch's sequences, and a PagedKv."""

    def __init__(self, cache: KvCache, batch: AttentionBatch) -> None:
        self._cache = cache
        self.batch = batch

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See KvView.attend."""
        keys, values = self._cache.layers[layer]
        self._cache.kernel.store(keys, values, k, v, self.batch)
        return self._cache.kernel.attend(q, keys, values, self.batch, scale)

    def cache(self, layer: int) -> tuple[Tensor, Tensor]:
        """See PagedKv.cache."""
        return self._cache.layers[layer]

    @property
    def native_step(self) -> Structure:
        """See PagedKv.native_step."""
        assert isinstance(self._cache.kernel, NativeAttention), "a compiled layer needs the compiled kernel's cache"
        return self._cache.kernel.step(self.batch)
