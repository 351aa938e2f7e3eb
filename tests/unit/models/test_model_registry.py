"""The list of families, their tensors, and the sizes that ModelSpec claims for them."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import torch

import afd.models
from afd.errors import UnsupportedModel
from afd.models import registry
from afd.spec import AttentionSpec, ModelSpec, MoeSpec, RopeSpec
from afd.topology import FfnShard
from afd.types import Role

MOE = MoeSpec(layers=(1, 2), experts=6, top_k=2, intermediate=20, shared_intermediate=0, renormalise=True)


def spec_of(family: str, *, tied: bool = False) -> ModelSpec:
    attention = {
        "step3": AttentionSpec("mfa", 5, 1, 16, q_rank=24),
        "llama": AttentionSpec("gqa", 6, 2, 16),
        "qwen3_moe": AttentionSpec("gqa", 6, 2, 16, qk_norm=True),
    }[family]
    moe = {"step3": MoeSpec((1, 3), 6, 2, 20, 28, True), "llama": None, "qwen3_moe": MOE}[family]
    return ModelSpec(family, 4, 32, 50, 64, 1e-5, tied, attention, RopeSpec(16, 1e4), 40, moe)


@pytest.mark.parametrize("family", registry.FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_specs_parameter_count_is_the_sum_of_the_listed_tensors(family: str, tied: bool) -> None:
    spec = spec_of(family, tied=tied)
    tensors = [t for t in registry.family(family).tensors(spec) if not t.optional]
    for role in Role:
        assert spec.parameters(role) == sum(math.prod(t.shape) for t in tensors if t.role is role)


@pytest.mark.parametrize("family", registry.FAMILIES)
def test_every_tensor_is_listed_once_and_only_ffn_tensors_are_cut(family: str) -> None:
    tensors = registry.family(family).tensors(spec_of(family))
    assert len({t.name for t in tensors}) == len(tensors)
    for tensor in tensors:
        assert bool(tensor.cuts) == (tensor.role is Role.FFN), tensor
        assert all(cut.axis < len(tensor.shape) for cut in tensor.cuts)
    assert [t.name for t in tensors if t.optional] == []
    assert [t.name for t in registry.family(family).tensors(spec_of(family, tied=True)) if t.optional] == [
        "lm_head.weight"
    ]


@pytest.mark.parametrize("family", registry.FAMILIES)
def test_a_half_asks_for_its_own_roles_tensors_and_for_all_of_them(family: str) -> None:
    class Recorder(dict[str, torch.Tensor]):
        asked: list[str]

        def __getitem__(self, name: str) -> torch.Tensor:
            self.asked.append(name)
            return super().__getitem__(name)

    spec = spec_of(family)
    entry = registry.family(family)
    for role in Role:
        names = [t.name for t in entry.tensors(spec) if t.role is role]
        weights = Recorder({t.name: torch.zeros(t.shape) for t in entry.tensors(spec) if t.role is role})
        weights.asked = []
        half = entry.attention(spec, weights) if role is Role.ATTENTION else entry.ffn(spec, weights, FfnShard(0, 1, 1))
        assert half.spec is spec
        assert sorted(weights.asked) == sorted(names), "each once, so that they can be read from files one by one"


def test_an_unknown_family_is_answered_with_the_choices() -> None:
    with pytest.raises(UnsupportedModel, match=r"'gpt2'.*step3, llama, qwen3_moe"):
        registry.family("gpt2")


def test_models_know_neither_files_nor_wires() -> None:
    for path in Path(afd.models.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(m.startswith(("afd.weights", "afd.transport", "ray", "grpc")) for m in modules), path
