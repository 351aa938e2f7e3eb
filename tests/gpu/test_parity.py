"""The same halves on CUDA as on the CPU: the device comes from the weights. Needs torch and pytest, nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from afd.layers.attention.base import AttentionBatch
from afd.layers.attention.registry import KERNELS, kernel
from afd.models import registry
from afd.models.halves import no_grad
from afd.models.reference import WholeModel
from afd.spec import AttentionSpec, ModelSpec, MoeSpec, RopeSpec
from afd.topology import FfnShard
from afd.types import Role

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

ATTENTION = {
    "step3": AttentionSpec("mfa", 8, 1, 192, q_rank=96),
    "llama": AttentionSpec("gqa", 9, 3, 64),
    "qwen3_moe": AttentionSpec("gqa", 8, 2, 64, qk_norm=True),
}
MOE = {
    "step3": MoeSpec((1, 2), 8, 2, 96, 64, True),
    "llama": None,
    "qwen3_moe": MoeSpec((0, 1, 2), 8, 8, 96, 0, False),
}


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def spec_of(family: str) -> ModelSpec:
    attention = ATTENTION[family]
    rope = RopeSpec(attention.head_dim, 10000.0)
    return ModelSpec(family, 3, 128, 300, 512, 1e-5, family == "llama", attention, rope, 200, MOE[family])


def weights_of(spec: ModelSpec, device: str, dtype: torch.dtype) -> dict[Role, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    by_role: dict[Role, dict[str, Tensor]] = {role: {} for role in Role}
    for tensor in registry.family(spec.family).tensors(spec):
        values = torch.randn(tensor.shape, generator=generator)
        values = 1 + 0.2 * values if len(tensor.shape) == 1 else values * tensor.shape[-1] ** -0.5
        by_role[tensor.role][tensor.name] = values.to(device, dtype)
    return by_role


def model_on(spec: ModelSpec, device: str, dtype: torch.dtype) -> WholeModel:
    family, weights, one = registry.family(spec.family), weights_of(spec, device, dtype), FfnShard(0, 1, 1)
    attention = family.attention(spec, weights[Role.ATTENTION])
    return WholeModel(spec, attention, family.ffn(spec, weights[Role.FFN], one), device)


@pytest.mark.parametrize("family", registry.FAMILIES)
def test_logits_on_cuda_are_those_on_the_cpu(family: str) -> None:
    spec = spec_of(family)
    prompt = torch.randint(0, spec.vocab, (70,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = model_on(spec, "cpu", torch.float32).forward(prompt)
    found = model_on(spec, "cuda", torch.float32).forward(prompt)
    assert found.is_cuda
    assert ((found.cpu() - expected).abs().max() / expected.abs().max()).item() < 1e-4


@pytest.mark.parametrize("family", registry.FAMILIES)
def test_bf16_on_cuda_stays_near_bf16_on_the_cpu(family: str) -> None:
    spec = spec_of(family)
    prompt = torch.randint(0, spec.vocab, (70,), generator=torch.Generator().manual_seed(2)).tolist()
    expected = model_on(spec, "cpu", torch.bfloat16).forward(prompt)
    found = model_on(spec, "cuda", torch.bfloat16).forward(prompt).cpu()
    assert torch.nn.functional.cosine_similarity(found, expected, dim=-1).mean() > 0.98


@pytest.mark.parametrize("family", registry.FAMILIES)
def test_the_same_work_twice_on_cuda_gives_the_same_bits(family: str) -> None:
    model = model_on(spec_of(family), "cuda", torch.float32)
    assert torch.equal(model.forward(list(range(50))), model.forward(list(range(50))))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(9, 1, 192), (9, 3, 64), (4, 4, 32)])
def test_attention_kernels_on_cuda_are_the_oracle_on_the_cpu(
    name: str, dtype: torch.dtype, heads: tuple[int, int, int]
) -> None:
    """Decodes of ragged length and prefill chunks, beside slots of NaN."""
    torch.manual_seed(0)
    num_heads, kv_heads, dim = heads
    queries, contexts = [1, 6, 1, 1, 9, 1], [33, 6, 1, 100, 40, 17]
    free, tables = torch.randperm(20).tolist(), []
    for context in contexts:
        tables.append([free.pop() + 1 for _ in range(-(-context // 16))])
    fill, step = (AttentionBatch.build(lengths, contexts, tables, 16) for lengths in (contexts, queries))
    on_gpu = AttentionBatch.build(queries, contexts, tables, 16, "cuda")
    k_cache = torch.full((21, 16, kv_heads, dim), float("nan"), dtype=dtype)
    v_cache = k_cache.clone()
    k, v = (torch.randn(sum(contexts), kv_heads, dim).to(dtype) for _ in range(2))
    q = torch.randn(sum(queries), num_heads, dim).to(dtype)
    oracle = kernel("plain")
    with no_grad():
        oracle.store(k_cache, v_cache, k, v, fill)
        expected = oracle.attend(q, k_cache, v_cache, step, dim**-0.5)
        found = kernel(name).attend(q.cuda(), k_cache.cuda(), v_cache.cuda(), on_gpu, dim**-0.5).cpu()
    tolerance = 1e-4 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
