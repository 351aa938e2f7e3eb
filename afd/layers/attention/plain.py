"""Paged attention in plain torch, on CPU and CUDA: the oracle, and one fast enough to serve with."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from afd.layers.attention.base import AttentionBatch


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One sequence, all in float32, by the definition: q [queries, heads, dim] are the last of k and v
    [context, kv_heads, dim]. Returns [queries, heads, dim] in q's dtype."""
    (queries, heads, dim), (context, kv_heads, _) = q.shape, k.shape
    grouped = q.float().view(queries, kv_heads, heads // kv_heads, dim)
    scores = torch.einsum("qhgd,chd->hgqc", grouped, k.float()) * scale
    position = torch.arange(context - queries, context, device=q.device)
    future = torch.arange(context, device=q.device) > position[:, None]  # [queries, context]
    weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
    return torch.einsum("hgqc,chd->qhgd", weights, v.float()).reshape(queries, heads, dim).to(q.dtype)


def allocate(
    num_blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Keys and values as both kernels here keep them, [num_blocks, block_size, kv_heads, head_dim]."""
    shape = (num_blocks, block_size, kv_heads, head_dim)
    return torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device)


class PlainAttention:
    """The oracle: one sequence after the other."""

    allocate = staticmethod(allocate)

    def store(self, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, batch: AttentionBatch) -> None:
        k_cache.flatten(0, 1).index_copy_(0, batch.slots, k)
        v_cache.flatten(0, 1).index_copy_(0, batch.slots, v)

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, scale: float) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        keys, values = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
        start = 0
        for sequence, (queries, context) in enumerate(zip(batch.query_lengths, batch.context_lengths, strict=True)):
            rows = slice(start, start + queries)
            slots = _slots(batch, sequence, context)
            out[rows] = causal_attention(q[rows], keys[slots], values[slots], scale)
            start += queries
        return out


@dataclass(frozen=True)
class _DecodeGroup:
    """Sequences of one query each, padded to the longest of them."""

    rows: Tensor  # [n] which tokens of the step
    slots: Tensor  # [n · longest] their contexts; padding repeats the sequence's own last slot
    bias: Tensor | None  # [n, 1, 1, longest]: 0, or -inf on padding; None: no padding


@dataclass(frozen=True)
class _Chunk:
    """One sequence with several queries."""

    rows: slice
    slots: Tensor  # [context]
    bias: Tensor  # [queries, context]: 0, or -inf on the future


@dataclass(frozen=True)
class _Plan:
    groups: tuple[_DecodeGroup, ...]
    chunks: tuple[_Chunk, ...]


class BatchedPlainAttention(PlainAttention):
    """All decodes in a few gathers and products, prefill chunks one by one, through torch's fused attention.

    The query heads of a KV head are laid along the query axis, so keys and values are never repeated. A decode group
    holds at most `group_tokens` tokens of padded context: on a CPU as many as the cache keeps warm between the gather
    and the product (512 to 4096 were mostly alike; one gather for everything was up to 2.4 times slower).
    """

    def __init__(self, group_tokens: int | None = None) -> None:
        self._group_tokens = group_tokens
        self._plans: WeakKeyDictionary[AttentionBatch, _Plan] = WeakKeyDictionary()

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, scale: float) -> Tensor:
        plan = self._plans.get(batch)
        if plan is None:
            plan = self._plans[batch] = self._make_plan(batch, q)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        keys, values = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
        _, heads, dim = q.shape
        kv_heads = keys.shape[1]
        for group in plan.groups:
            n = group.rows.shape[0]
            k = keys.index_select(0, group.slots).view(n, -1, kv_heads, dim).transpose(1, 2)
            v = values.index_select(0, group.slots).view(n, -1, kv_heads, dim).transpose(1, 2)
            grouped = q.index_select(0, group.rows).view(n, kv_heads, heads // kv_heads, dim)
            seen = F.scaled_dot_product_attention(grouped, k, v, attn_mask=group.bias, scale=scale)
            out.index_copy_(0, group.rows, seen.reshape(n, heads, dim))
        for chunk in plan.chunks:
            k = keys.index_select(0, chunk.slots).transpose(0, 1)[None]  # [1, kv_heads, context, dim]
            v = values.index_select(0, chunk.slots).transpose(0, 1)[None]
            queries = q[chunk.rows].transpose(0, 1)[None]  # [1, heads, queries, dim]
            seen = F.scaled_dot_product_attention(
                queries, k, v, attn_mask=chunk.bias, scale=scale, enable_gqa=heads != kv_heads
            )
            out[chunk.rows] = seen[0].transpose(0, 1)
        return out

    def _make_plan(self, batch: AttentionBatch, q: Tensor) -> _Plan:
        limit = self._group_tokens or (2048 if q.device.type == "cpu" else 1 << 18)
        starts = [0]
        for queries in batch.query_lengths:
            starts.append(starts[-1] + queries)
        decodes = [s for s, queries in enumerate(batch.query_lengths) if queries == 1]
        decodes.sort(key=batch.context_lengths.__getitem__)
        groups: list[list[int]] = []
        for sequence in decodes:
            if groups and (len(groups[-1]) + 1) * batch.context_lengths[sequence] <= limit:
                groups[-1].append(sequence)
            else:
                groups.append([sequence])
        return _Plan(
            tuple(_decode_group(batch, group, starts, q) for group in groups),
            tuple(
                _chunk(batch, s, starts[s], queries, q) for s, queries in enumerate(batch.query_lengths) if queries > 1
            ),
        )


def _decode_group(batch: AttentionBatch, sequences: list[int], starts: list[int], q: Tensor) -> _DecodeGroup:
    lengths = [batch.context_lengths[s] for s in sequences]
    longest, device = max(lengths), q.device
    members = torch.tensor(sequences, device=device)
    last = torch.tensor(lengths, device=device)[:, None] - 1  # [n, 1]
    columns = torch.arange(longest, device=device)  # [longest]
    positions = torch.minimum(columns, last)  # [n, longest]
    blocks = batch.block_tables[members].gather(1, positions // batch.block_size).long()
    slots = blocks * batch.block_size + positions % batch.block_size
    bias = None
    if min(lengths) < longest:
        bias = torch.zeros(slots.shape, dtype=q.dtype, device=device).masked_fill_(columns > last, float("-inf"))
        bias = bias[:, None, None, :]
    rows = torch.tensor([starts[s] for s in sequences], device=device)
    return _DecodeGroup(rows, slots.flatten(), bias)


def _chunk(batch: AttentionBatch, sequence: int, start: int, queries: int, q: Tensor) -> _Chunk:
    context = batch.context_lengths[sequence]
    bias = torch.full((queries, context), float("-inf"), dtype=q.dtype, device=q.device)
    bias.triu_(context - queries + 1)
    return _Chunk(slice(start, start + queries), _slots(batch, sequence, context), bias)


def _slots(batch: AttentionBatch, sequence: int, context: int) -> Tensor:
    """Where the first `context` tokens of a sequence lie, [context] int64."""
    positions = torch.arange(context, device=batch.block_tables.device)
    blocks = batch.block_tables[sequence].index_select(0, positions // batch.block_size).long()
    return blocks * batch.block_size + positions % batch.block_size
