"""The partial sums of all FFN ranks are the whole layer's delta, for every family and cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from afd.models import registry
from afd.models.halves import Routing
from afd.spec import ModelSpec, from_config
from afd.topology import FfnShard
from tests.equivalence.checkpoints import MODELS, ffn_half, random_weights

CUTS = [(1, 1), (2, 1), (3, 1), (6, 1), (1, 2), (1, 3), (2, 2), (2, 3), (3, 2)]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def routing_of(spec: ModelSpec, tokens: int, kind: str) -> Routing | None:
    if kind == "dense":
        return None
    generator = torch.Generator().manual_seed(tokens)
    allowed = spec.top_k if kind == "crowded" else spec.num_experts
    rows = [torch.randperm(allowed, generator=generator)[: spec.top_k] for _ in range(tokens)]
    ids = torch.stack(rows) if rows else torch.empty(0, spec.top_k)
    return Routing(ids.int(), torch.rand(tokens, spec.top_k, generator=generator))


@pytest.mark.parametrize(("ep", "tp"), CUTS)
@pytest.mark.parametrize("name", MODELS)
def test_partial_sums_of_all_ffn_ranks_are_the_layers_delta(name: str, ep: int, tp: int) -> None:
    """Also where slices are uneven, where every token chose the first experts, and where there is no token."""
    spec = from_config(MODELS[name])
    weights = random_weights(spec)
    whole = ffn_half(spec, weights, FfnShard(0, 1, 1))
    parts = [ffn_half(spec, weights, FfnShard(r, ep, tp)) for r in range(ep * tp)]
    silent = 0
    for layer in range(spec.layers):
        for kind in ("spread", "crowded") if spec.is_moe(layer) else ("dense",):
            for tokens in (0, 1, 7):
                y, routing = torch.randn(tokens, spec.hidden), routing_of(spec, tokens, kind)
                before = y.clone()
                delta = whole.layer(layer, y, routing)
                partial = [part.layer(layer, y, routing) for part in parts]
                silent += sum(p is None for p in partial) if tokens else 0
                assert torch.equal(y, before), "y belongs to the transport"
                if delta is None:
                    assert tokens == 0
                    continue
                summed = sum((p for p in partial if p is not None), torch.zeros(tokens, spec.hidden))
                torch.testing.assert_close(summed, delta, rtol=1e-4, atol=1e-5)
    without_shared = spec.moe is not None and not spec.moe.shared_intermediate
    assert (silent > 0) == (without_shared and ep > 1), "only a rank whose experts nobody chose may stay silent"


@pytest.mark.parametrize("name", MODELS)
def test_more_ranks_than_columns_leave_some_with_nothing_and_the_sum_right(name: str) -> None:
    changes: dict[str, object] = {"intermediate_size": 2, "moe_intermediate_size": 2}
    if "share_expert_dim" in MODELS[name]:
        changes["share_expert_dim"] = min(2, int(str(MODELS[name]["share_expert_dim"])))
    spec = from_config(MODELS[name] | changes)
    weights = random_weights(spec)
    y = torch.randn(5, spec.hidden)
    for layer, kind in ((0, "dense"), *(((1, "spread"),) if spec.is_moe(1) else ())):
        routing = routing_of(spec, 5, kind)
        delta = ffn_half(spec, weights, FfnShard(0, 1, 1)).layer(layer, y, routing)
        parts = [ffn_half(spec, weights, FfnShard(r, 1, 3)).layer(layer, y, routing) for r in range(3)]
        assert delta is not None
        assert any(p is None for p in parts)
        summed = sum((p for p in parts if p is not None), torch.zeros(5, spec.hidden))
        torch.testing.assert_close(summed, delta, rtol=1e-4, atol=1e-5)


def test_shards_cut_every_ffn_tensor_into_parts_that_cover_it_once() -> None:
    for config in MODELS.values():
        spec = from_config(config)
        for tensor in registry.family(spec.family).tensors(spec):
            for cut in tensor.cuts:
                edges = [FfnShard(r, 2, 3).bounds(tensor.shape[cut.axis], cut.by) for r in range(6)]
                if cut.by == "rank":
                    assert (edges[0][0], edges[-1][1]) == (0, tensor.shape[cut.axis])
                    assert all(a[1] == b[0] for a, b in pairwise(edges))
