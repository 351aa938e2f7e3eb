"""The oracle's own promises: a cache changes nothing, and generation stops where it should."""

from __future__ import annotations

import pytest
import torch

from afd.models import registry
from afd.models.halves import no_grad
from afd.models.reference import ContiguousKv, WholeModel
from afd.spec import AttentionSpec, ModelSpec, RopeSpec
from afd.topology import FfnShard
from afd.types import Role

SPEC = ModelSpec("llama", 2, 32, 50, 64, 1e-5, True, AttentionSpec("gqa", 4, 2, 8), RopeSpec(8, 1e4), 40)


def build(shard: FfnShard) -> WholeModel:
    family, generator = registry.family(SPEC.family), torch.Generator().manual_seed(0)
    weights = {t.name: torch.randn(t.shape, generator=generator) * t.shape[-1] ** -0.5 for t in family.tensors(SPEC)}
    names = {t.name: t.role for t in family.tensors(SPEC)}
    attention = family.attention(SPEC, {n: w for n, w in weights.items() if names[n] is Role.ATTENTION})
    return WholeModel(SPEC, attention, family.ffn(SPEC, weights, shard))


def test_generation_with_a_cache_follows_the_logits_of_the_whole_text() -> None:
    model = build(FfnShard(0, 1, 1))
    tokens, logits = model.generate_with_logits([3, 1, 4], 10)
    assert len(tokens) == 10
    assert tokens == model.generate([3, 1, 4], 10)
    torch.testing.assert_close(logits, model.forward([3, 1, 4, *tokens])[2:-1], rtol=1e-4, atol=1e-5)
    assert tokens == logits.argmax(-1).tolist()


def test_generation_ends_with_the_end_token_included() -> None:
    model = build(FfnShard(0, 1, 1))
    free = model.generate([3, 1, 4], 10)
    stop = free[4]
    assert model.generate([3, 1, 4], 10, eos_ids=(stop,)) == free[: free.index(stop) + 1]
    tokens, logits = model.generate_with_logits([3], 0)
    assert tokens == []
    assert logits.shape == (0, SPEC.vocab)


def test_a_part_of_the_ffn_is_no_oracle() -> None:
    with pytest.raises(AssertionError, match="whole FFN"):
        build(FfnShard(0, 1, 2))


def test_zero_tokens_pass_both_halves() -> None:
    model = build(FfnShard(0, 1, 1))
    with no_grad():
        hidden = model.attention.embed(torch.empty(0, dtype=torch.int64))
        out = model.attention.layer(0, hidden, torch.empty(0, dtype=torch.int64), ContiguousKv())
        delta = model.ffn.layer(0, out.y, out.routing)
        assert delta is not None
        assert out.residual.shape == out.y.shape == delta.shape == (0, SPEC.hidden)
        assert model.attention.logits(hidden).shape == (0, SPEC.vocab)
