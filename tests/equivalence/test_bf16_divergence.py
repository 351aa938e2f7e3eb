"""How far bfloat16 takes the logits from float32, on the embedded model: no further with compiled kernels than with
plain torch; and how much further FP8 dispatches take them. The stated divergence: a mean Kullback-Leibler divergence
below 0.02 nats (0.05 with FP8 dispatches), and the best token unchanged wherever float32's two best are more than 1.0
apart.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from afd import build
from afd.config import Deployment
from afd.layers.attention.registry import kernel
from afd.models.halves import no_grad
from afd.native.library import load
from afd.topology import FfnShard
from afd.transport.float8 import dequantise, quantise
from afd.types import GenerateRequest, Role, SamplingParams
from attention_worker.kv_cache import KvCache
from attention_worker.scheduler import Batch, Chunk
from attention_worker.sequence import Sequence

pytestmark = [pytest.mark.smollm2, pytest.mark.skipif(load() is None, reason="no C++ compiler, or AFD_KERNELS=plain")]

TEXT = """In 1687 Isaac Newton published the Principia, in which he set out the laws of motion and of gravity. A planet,
he showed, falls around the sun as an apple falls from its tree. Ingredients: 2 eggs, 100 g flour, one and a half cups
of milk. Beat the eggs, add the flour, and stir until the batter is smooth. def quicksort(items): return items if the
list is short; otherwise choose a pivot. Once upon a time, in a small village by the northern sea, there lived an old
fisherman who went out every morning, whatever the weather, and came home every evening with an empty boat."""

WHOLE = FfnShard(0, 1, 1)


def logits_of(model: str, dtype: str, compiled: bool, token_ids: list[int], fp8: bool = False) -> Tensor:
    """Logits after every token, in two chunks and then one token, as prefill and decode go: [tokens, vocab]. `fp8`: as
    if dispatched so."""
    plan = build.plan(Deployment(model=model, dtype=dtype))  # type: ignore[arg-type]
    kernels = build.attention_kernels(plan, 16) if compiled else None
    attention = plan.family.attention(plan.spec, plan.weights(Role.ATTENTION), kernels)
    ffn = plan.family.ffn(plan.spec, plan.weights(Role.FFN, WHOLE), WHOLE, kernels)
    cache = KvCache(plan.spec, 40, 16, plan.torch_dtype, plan.device, kernel("native" if compiled else "batched"))
    sequence = Sequence(GenerateRequest("one", tuple(token_ids), SamplingParams()), 0, 640)
    sequence.block_table = list(range(40))
    rows, cuts = [], [0, len(token_ids) // 3, len(token_ids) - 1, len(token_ids)]
    with no_grad():
        for start, end in itertools.pairwise(cuts):
            view = cache.view(Batch((Chunk(sequence, start, end - start),)))
            hidden = attention.embed(torch.tensor(token_ids[start:end]))
            for layer in range(plan.spec.layers):
                out = attention.layer(layer, hidden, view.batch.positions, view)
                y = dequantise(*quantise(out.y), out.y.dtype) if fp8 else out.y
                delta = ffn.layer(layer, y, out.routing)
                assert delta is not None
                hidden = out.residual + delta
            rows.append(attention.logits(hidden))
    return torch.cat(rows)


def text_ids(model: str) -> list[int]:
    files = build.plan(Deployment(model=model)).files
    return Tokenizer.from_file(str(files.tokenizer_json)).encode(TEXT).ids


def divergence(exact: Tensor, other: Tensor) -> Tensor:
    """Kullback-Leibler divergence in nats, [tokens]."""
    p, q = exact.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("model", ["smollm2", "smollm2-step3"])
def test_bf16_logits_stay_within_the_stated_divergence(model: str) -> None:
    ids = text_ids(model)
    exact = logits_of(model, "fp32", True, ids)
    plain_exact = logits_of(model, "fp32", False, ids)
    assert (exact - plain_exact).abs().max() < 5e-3, "float32, compiled against plain"
    ours, plain = (logits_of(model, "bf16", compiled, ids) for compiled in (True, False))
    ours_kl, plain_kl = divergence(exact, ours).mean(), divergence(exact, plain).mean()
    dispatched = logits_of(model, "bf16", True, ids, fp8=True)
    fp8_kl = divergence(exact, dispatched).mean()
    print(f"{model}: mean divergence {ours_kl:.4f} nats compiled, {plain_kl:.4f} plain torch, {fp8_kl:.4f} with FP8")
    assert ours_kl < 0.02
    assert ours_kl < 1.3 * plain_kl
    assert ours_kl < fp8_kl < 0.05
    best = exact.topk(2, dim=-1)
    clear = best.values[:, 0] - best.values[:, 1] > 1.0
    assert clear.sum() > 50
    for logits in (ours, dispatched):
        assert torch.equal(logits.argmax(-1)[clear], best.indices[clear, 0])
