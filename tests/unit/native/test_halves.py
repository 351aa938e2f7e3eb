"""A compiled half gives what its plain twin gives, and a row's result depends on nothing but the row."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from afd.errors import ModelError
from afd.layers.attention.registry import kernel
from afd.models import registry
from afd.models.halves import AttentionOutput, Routing
from afd.native.library import load
from afd.native.packed import PackedLinear, best_columns
from afd.spec import ModelSpec
from afd.topology import FfnShard, ffn_shards
from afd.types import GenerateRequest, Role, SamplingParams
from attention_worker.kv_cache import KvCache
from attention_worker.scheduler import Batch, Chunk
from attention_worker.sequence import Sequence
from tests.rig import cut, tiny, weights_of

pytestmark = pytest.mark.skipif(load() is None, reason="no C++ compiler, or AFD_KERNELS=plain")

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2}
DTYPES = [torch.float32, torch.bfloat16]
BLOCK = 16


def typed(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: weight.to(dtype) for name, weight in weights.items()}


def batch_of(lengths: list[tuple[int, int]]) -> Batch:
    """Sequences of (tokens so far, tokens of this step), each with blocks of its own."""
    free = itertools.count()
    chunks = []
    for start, count in lengths:
        prompt = tuple(range(1, start + count + 1))
        sequence = Sequence(GenerateRequest(str(start), prompt, SamplingParams()), 0, 512)
        sequence.block_table = [next(free) for _ in range(-(-(start + count) // BLOCK))]
        chunks.append(Chunk(sequence, start, count))
    return Batch(tuple(chunks))


def run_attention(
    spec: ModelSpec, dtype: torch.dtype, compiled: bool, lengths: list[tuple[int, int]]
) -> list[AttentionOutput]:
    """Every layer's half over one step, after another step has filled the contexts before it."""
    library = load() if compiled else None
    weights = typed(cut(spec, weights_of(spec), Role.ATTENTION), dtype)
    half = registry.family(spec.family).attention(spec, weights, library)
    cache = KvCache(spec, 64, BLOCK, dtype, torch.device("cpu"), kernel("native" if compiled else "batched"))
    batch = batch_of(lengths)
    before = Batch(tuple(Chunk(c.sequence, 0, c.start) for c in batch.chunks if c.start))
    outputs = []
    for step in (before, batch):
        view = cache.view(step)
        rows = [
            torch.randn(c.count, spec.hidden, generator=torch.Generator().manual_seed(c.start)) for c in step.chunks
        ]
        hidden = torch.cat(rows).to(dtype)
        outputs = [half.layer(layer, hidden, view.batch.positions, view) for layer in range(spec.layers)]
    return outputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["step3", "llama", "qwen3_moe"])
def test_the_compiled_attention_half_agrees_with_the_plain_one(family: str, dtype: torch.dtype) -> None:
    spec = tiny(family)
    lengths = [(17, 1), (0, 9), (40, 23), (31, 1)]
    for ours, plain in zip(*(run_attention(spec, dtype, compiled, lengths) for compiled in (True, False)), strict=True):
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(ours.residual, plain.residual, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(ours.y, plain.y, rtol=tolerance, atol=tolerance)
        assert (ours.routing is None) == (plain.routing is None)
        if ours.routing and plain.routing and dtype is torch.float32:
            assert torch.equal(ours.routing.expert_ids, plain.routing.expert_ids)
            torch.testing.assert_close(ours.routing.weights, plain.routing.weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sharding", ["ep", "tp", "hybrid"])
@pytest.mark.parametrize("family", ["step3", "llama", "qwen3_moe"])
def test_the_compiled_ffn_half_agrees_with_the_plain_one(family: str, sharding: str, dtype: torch.dtype) -> None:
    """Four ranks: widths that divide by nothing, and in bfloat16 an odd inner dimension."""
    spec = tiny(family)
    y = torch.randn(19, spec.hidden).to(dtype)
    ids = torch.stack([torch.randperm(max(1, spec.num_experts))[: spec.top_k] for _ in range(19)]).int()
    for shard in ffn_shards(4, sharding, spec.num_experts):  # type: ignore[arg-type]
        weights = typed(cut(spec, weights_of(spec), Role.FFN, shard), dtype)
        build = registry.family(spec.family).ffn
        plain, ours = build(spec, dict(weights), shard), build(spec, dict(weights), shard, load())
        for layer in range(spec.layers):
            routing = Routing(ids, torch.rand(19, spec.top_k)) if spec.is_moe(layer) else None
            expected, got = plain.layer(layer, y, routing), ours.layer(layer, y, routing)
            assert (expected is None) == (got is None)
            if expected is not None and got is not None:
                torch.testing.assert_close(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["step3", "llama"])
def test_a_row_depends_on_its_own_sequence_alone_to_the_last_bit(family: str, dtype: torch.dtype) -> None:
    spec = tiny(family)
    shard = FfnShard(0, 1, 1)
    ffn = registry.family(family).ffn(spec, typed(cut(spec, weights_of(spec), Role.FFN, shard), dtype), shard, load())
    together = run_attention(spec, dtype, True, [(9, 1), (20, 1), (0, 30)])
    alone = run_attention(spec, dtype, True, [(9, 1)])
    for layer in range(spec.layers):
        many, one = together[layer], alone[layer]
        assert torch.equal(many.residual[:1], one.residual)
        assert torch.equal(many.y[:1], one.y)
        whole, single = ffn.layer(layer, many.y, many.routing), ffn.layer(layer, one.y, one.routing)
        assert whole is not None
        assert single is not None
        assert torch.equal(whole[:1], single)


def all_slices(packed: PackedLinear, x: Tensor, work: int) -> Tensor:
    slices = packed.in_slices(x, work)
    while True:
        try:
            next(slices)
        except StopIteration as end:
            return end.value


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_packed_product_is_the_same_for_any_number_of_rows_and_threads(dtype: torch.dtype, threads: int) -> None:
    library = load()
    assert library is not None
    torch.manual_seed(0)
    weight, x = torch.randn(131, 70).to(dtype), torch.randn(40, 70).to(dtype)
    packed = PackedLinear(library, weight)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    whole = all_slices(packed, x, 10**9)
    rows = torch.cat([all_slices(packed, x[i : i + 1], 10**9) for i in range(40)])
    few_at_a_time = all_slices(packed, x, 1)
    torch.set_num_threads(before)
    assert torch.equal(whole, rows)
    assert torch.equal(whole, few_at_a_time)
    torch.testing.assert_close(whole, x.float() @ weight.float().T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed(x).float(), whole, rtol=1e-2, atol=1e-2)


def test_no_tokens_are_legal_and_an_unknown_expert_is_an_error() -> None:
    spec = tiny("step3")
    shard = FfnShard(0, 1, 1)
    ffn = registry.family("step3").ffn(spec, cut(spec, weights_of(spec), Role.FFN, shard), shard, load())
    none = ffn.layer(1, torch.empty(0, spec.hidden), Routing(torch.empty(0, 3, dtype=torch.int32), torch.empty(0, 3)))
    assert none is not None
    assert none.shape == (0, spec.hidden)
    for wrong in (-1, 12):
        ids = torch.tensor([[0, 1, wrong]], dtype=torch.int32)
        with pytest.raises(ModelError, match=rf"expert {wrong}, but the model has experts 0 to 11"):
            ffn.layer(1, torch.randn(1, spec.hidden), Routing(ids, torch.rand(1, 3)))


def test_equal_gate_logits_are_decided_for_the_lowest_expert_id() -> None:
    spec = tiny("step3")
    weights = cut(spec, weights_of(spec), Role.ATTENTION)
    for name in weights:
        if "gate" in name:
            weights[name].zero_()
    half = registry.family("step3").attention(spec, weights, load())
    cache = KvCache(spec, 8, BLOCK, torch.float32, torch.device("cpu"), kernel("native"))
    view = cache.view(batch_of([(0, 3)]))
    routing = half.layer(1, torch.randn(3, spec.hidden), view.batch.positions, view).routing
    assert routing is not None
    assert routing.expert_ids.tolist() == [[0, 1, 2]] * 3
    torch.testing.assert_close(routing.weights, torch.full((3, 3), 1 / 3))


def test_the_best_column_is_the_first_of_equal_ones() -> None:
    torch.manual_seed(0)
    for columns in (1, 7, 64, 131, 1000):
        x = torch.randint(0, columns, (9, columns)).float()
        x[3] = 0.5
        expected = [row.index(max(row)) for row in x.tolist()]
        assert best_columns(x).tolist() == expected
