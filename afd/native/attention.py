"""Paged attention by the compiled kernel: decode and chunked prefill, GQA and MFA, float32 and bfloat16.

The cache's inner layout is the kernel's own (src/attention.h): [block, KV head] pieces in which the same dimension of
sixteen tokens lies side by side.
"""

from __future__ import annotations

import ctypes
from ctypes import byref
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from afd.layers.attention.base import AttentionBatch
from afd.native.library import CHeads, CStep

GROUP = 16  # tokens; block_size must be a multiple


class NativeAttention:
    """A PagedAttention (afd.layers.attention.base) for a CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._steps: WeakKeyDictionary[AttentionBatch, CStep] = WeakKeyDictionary()

    def allocate(
        self, num_blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        assert block_size % GROUP == 0, f"block_size is {block_size}, not a multiple of {GROUP}"
        assert head_dim % self._library.afd_lanes() == 0, f"head_dim is {head_dim}"
        assert device.type == "cpu", f"the compiled kernel runs on the CPU, not on {device}"
        shape = (num_blocks, kv_heads, block_size, head_dim)
        caches = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
        for cache in caches:  # a sequence's blocks lie all over it: small pages would cost a quarter of the bandwidth
            self._library.afd_expect_scattered(cache.data_ptr(), cache.nbytes)
        return caches

    def step(self, batch: AttentionBatch) -> CStep:
        """The batch as the kernels take it; points into the batch's tensors."""
        step = self._steps.get(batch)
        if step is None:
            step = self._steps[batch] = CStep(
                len(batch.slots), len(batch.query_lengths), batch.block_tables.shape[1], batch.block_size,
                batch.query_starts.data_ptr(), batch.context_lens.data_ptr(), batch.block_tables.data_ptr(),
                batch.slots.data_ptr(), batch.positions.data_ptr(),
            )  # fmt: skip
        return step

    def store(self, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, batch: AttentionBatch) -> None:
        """See PagedAttention.store. Tokens of a sequence must come in order."""
        _, kv_heads, block_size, dim = k_cache.shape
        k, v = k.contiguous(), v.contiguous()
        heads = CHeads(kv_heads, kv_heads, dim, block_size)
        self._library.afd_store_kv(
            _wide(k_cache), byref(heads), byref(self.step(batch)), k.data_ptr(), v.data_ptr(), k_cache.data_ptr(),
            v_cache.data_ptr(),
        )  # fmt: skip

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, scale: float) -> Tensor:
        """See PagedAttention.attend."""
        _, kv_heads, block_size, dim = k_cache.shape
        q = q.contiguous()
        heads, out = CHeads(q.shape[1], kv_heads, dim, block_size), torch.empty_like(q)
        self._library.afd_attend(
            _wide(q), torch.get_num_threads(), byref(heads), byref(self.step(batch)), q.data_ptr(),
            k_cache.data_ptr(), v_cache.data_ptr(), scale, out.data_ptr(),
        )  # fmt: skip
        return out


def _wide(tensor: Tensor) -> int:
    return int(tensor.dtype is torch.float32)
