"""The served kernel agrees with the oracle, and neither reads a slot that is not its sequence's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from afd.errors import ConfigError
from afd.layers.attention.base import AttentionBatch, PagedAttention
from afd.layers.attention.plain import BatchedPlainAttention, PlainAttention, causal_attention
from afd.layers.attention.registry import KERNELS, kernel
from afd.native.library import load

NAMES = [name for name in KERNELS if name != "native" or load() is not None]
compiled = pytest.mark.skipif(load() is None, reason="no C++ compiler, or AFD_KERNELS=plain")


class Case:
    """Sequences whose earlier tokens lie in a cache of scattered blocks; every other slot is NaN."""

    def __init__(
        self, lengths: list[tuple[int, int]], kv_heads: int, group: int, dim: int, block: int, dtype: torch.dtype
    ) -> None:
        """lengths: (this step's tokens, context with them) of each sequence."""
        queries, contexts = [q for q, _ in lengths], [c for _, c in lengths]
        needed = [-(-context // block) for context in contexts]
        free = (torch.randperm(sum(needed) + 3) + 1).tolist()  # block 0 is nobody's: it is what padding points to
        tables = [[free.pop() for _ in range(count)] for count in needed]
        self.batch = AttentionBatch.build(queries, contexts, tables, block)
        self.k = [torch.randn(c, kv_heads, dim).to(dtype) for c in contexts]
        self.v = [torch.randn(c, kv_heads, dim).to(dtype) for c in contexts]
        self.q = [torch.randn(q, kv_heads * group, dim).to(dtype) for q in queries]
        self.sizes = sum(needed) + 4, block, kv_heads, dim, dtype, torch.device("cpu")
        # The step in which all of it would have been stored at once.
        self.storing = AttentionBatch.build(contexts, contexts, tables, block)

    def attend(self, by: PagedAttention) -> Tensor:
        k_cache, v_cache = poisoned(by, *self.sizes)
        by.store(k_cache, v_cache, torch.cat(self.k), torch.cat(self.v), self.storing)
        return by.attend(self.packed_q, k_cache, v_cache, self.batch, 0.3)

    @property
    def packed_q(self) -> Tensor:
        return torch.cat(self.q) if self.q else torch.empty(0, 1, 1)


def poisoned(by: PagedAttention, *sizes: Any) -> tuple[Tensor, Tensor]:
    """A cache in which every slot is NaN until it is stored."""
    k_cache, v_cache = by.allocate(*sizes)
    return k_cache.fill_(float("nan")), v_cache.fill_(float("nan"))


@settings(max_examples=80, deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 40), st.booleans()), min_size=1, max_size=7),
    heads=st.sampled_from([(1, 9, 192), (1, 1, 16), (2, 3, 24), (4, 1, 8), (3, 3, 64)]),
    block=st.sampled_from([1, 3, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    group_tokens=st.sampled_from([None, 1, 30]),
    seed=st.integers(0, 9),
)
def test_both_kernels_agree_over_ragged_lengths_and_chunks(
    steps: list[tuple[int, int, bool]],
    heads: tuple[int, int, int],
    block: int,
    dtype: torch.dtype,
    group_tokens: int | None,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    lengths = [(1 if decode else chunk, (1 if decode else chunk) + earlier) for chunk, earlier, decode in steps]
    case = Case(lengths, *heads, block, dtype)
    plain, batched = case.attend(PlainAttention()), case.attend(BatchedPlainAttention(group_tokens))
    expected = torch.cat([causal_attention(q, k, v, 0.3) for q, k, v in zip(case.q, case.k, case.v, strict=True)])
    assert not plain.isnan().any()
    assert torch.equal(plain, expected), "the oracle is one sequence after the other"
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(batched, plain, rtol=tolerance, atol=tolerance)


@compiled
@settings(max_examples=80, deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(1, 70), st.integers(0, 200), st.booleans()), min_size=1, max_size=7),
    heads=st.sampled_from([(1, 9, 192), (1, 1, 16), (2, 3, 48), (4, 1, 32), (3, 3, 64), (1, 20, 80)]),
    block=st.sampled_from([16, 32, 48]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 9),
)
def test_the_compiled_kernel_agrees_with_the_definition(
    steps: list[tuple[int, int, bool]],
    heads: tuple[int, int, int],
    block: int,
    dtype: torch.dtype,
    threads: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    lengths = [(1 if decode else chunk, (1 if decode else chunk) + earlier) for chunk, earlier, decode in steps]
    case = Case(lengths, *heads, block, dtype)
    expected = torch.cat([causal_attention(q, k, v, 0.3) for q, k, v in zip(case.q, case.k, case.v, strict=True)])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    got = case.attend(kernel("native"))
    torch.set_num_threads(before)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@compiled
def test_the_compiled_kernel_gives_a_query_the_same_bits_whatever_it_is_computed_with() -> None:
    """A chunk of 70 at once, and the same tokens one step each, beside other sequences."""
    torch.manual_seed(1)
    by, kv_heads, heads, dim = kernel("native"), 2, 6, 64
    k, v, q = (torch.randn(70, n, dim).bfloat16() for n in (kv_heads, kv_heads, heads))
    cache = poisoned(by, 16, 16, kv_heads, dim, torch.bfloat16, torch.device("cpu"))
    whole = AttentionBatch.build([70], [70], [[3, 9, 1, 0, 5]], 16)
    by.store(*cache, k, v, whole)
    at_once = by.attend(q, *cache, whole, 0.2)
    for token in range(70):
        three = AttentionBatch.build([1, 1, 1], [5, token + 1, 70], [[3], [3, 9, 1, 0, 5], [3, 9, 1, 0, 5]], 16)
        alone = by.attend(torch.stack((q[0], q[token], q[3])), *cache, three, 0.2)
        assert torch.equal(alone[1], at_once[token])


@compiled
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without huge pages")
def test_a_large_cache_of_the_compiled_kernel_asks_for_huge_pages() -> None:
    """Blocks lie all over it: with small pages the kernel waits for page tables rather than for keys and values."""
    for cache in kernel("native").allocate(4096, 16, 1, 192, torch.bfloat16, torch.device("cpu")):
        middle, flags, here = cache.data_ptr() + cache.nbytes // 2, "", False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                here = int(found[1], 16) <= middle < int(found[2], 16)
            elif here and line.startswith("VmFlags:"):
                flags = line
        assert "hg" in flags.split(), flags


@pytest.mark.parametrize("name", NAMES)
def test_a_step_stores_before_it_attends_and_a_chunk_sees_itself_causally(name: str) -> None:
    """Prefill in chunks of 4, 1 and 3, through store and attend as a step does, equals the whole prompt at once."""
    torch.manual_seed(0)
    by, kv_heads, heads, dim, block = kernel(name), 2, 6, 16, 16 if name == "native" else 3
    k, v, q = torch.randn(8, kv_heads, dim), torch.randn(8, kv_heads, dim), torch.randn(8, heads, dim)
    k_cache, v_cache = poisoned(by, 6, block, kv_heads, dim, torch.float32, torch.device("cpu"))
    pieces = []
    for start, end in ((0, 4), (4, 5), (5, 8)):
        batch = AttentionBatch.build([end - start], [end], [[4, 1, 3, 5]], block)
        by.store(k_cache, v_cache, k[start:end], v[start:end], batch)
        pieces.append(by.attend(q[start:end], k_cache, v_cache, batch, 0.25))
    torch.testing.assert_close(torch.cat(pieces), causal_attention(q, k, v, 0.25), rtol=1e-5, atol=1e-5)


def test_the_definition_weighs_values_by_the_softmax_of_scores() -> None:
    q, k = torch.tensor([[[2.0]]]), torch.tensor([[[0.0]], [[1.0]]])
    out = causal_attention(q, k, torch.tensor([[[10.0]], [[20.0]]]), 0.5)
    share = torch.sigmoid(torch.tensor(1.0))
    torch.testing.assert_close(out.flatten(), (10 * (1 - share) + 20 * share)[None])


@pytest.mark.parametrize("name", NAMES)
def test_a_step_without_tokens_is_legal(name: str) -> None:
    batch = AttentionBatch.build([], [], [], 16)
    cache = kernel(name).allocate(2, 16, 1, 16, torch.float32, torch.device("cpu"))
    kernel(name).store(*cache, torch.empty(0, 1, 16), torch.empty(0, 1, 16), batch)
    assert kernel(name).attend(torch.empty(0, 4, 16), *cache, batch, 1.0).shape == (0, 4, 16)


def test_slots_follow_the_block_table() -> None:
    batch = AttentionBatch.build([3, 1], [6, 5], [[7, 2, 9], [4, 1]], 4)
    assert batch.slots.tolist() == [7 * 4 + 3, 2 * 4, 2 * 4 + 1, 1 * 4]
    assert batch.query_starts.tolist() == [0, 3, 4]
    assert batch.block_tables.tolist() == [[7, 2, 9], [4, 1, 0]]


def test_an_unknown_kernel_is_answered_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"'flash'.*plain, batched"):
        kernel("flash")
