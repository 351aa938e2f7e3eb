from __future__ import annotations

from pathlib import Path

import pytest
import torch

from afd.types import Cut, Role, TensorSpec
from tests.unit.weights.tiny_gguf import TinyGguf


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty AFD_CACHE."""
    monkeypatch.setenv("AFD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def specs() -> list[TensorSpec]:
    """One MoE layer with stacked experts, one with an expert per tensor, one dense, a shared expert, a tied head."""
    attention = {
        "model.embed_tokens.weight": (16, 8),
        "model.norm.weight": (8,),
        "model.layers.0.self_attn.q_proj.weight": (8, 8),
        "model.layers.1.moe.gate.weight": (4, 8),
    }
    ranks, columns = (Cut(0, "rank"),), (Cut(1, "rank"),)
    found = [TensorSpec(name, shape, Role.ATTENTION) for name, shape in attention.items()]
    found += [
        TensorSpec("lm_head.weight", (16, 8), Role.ATTENTION, optional=True),
        TensorSpec("model.layers.0.mlp.up_proj.weight", (10, 8), Role.FFN, ranks),
        TensorSpec("model.layers.0.mlp.down_proj.weight", (8, 10), Role.FFN, columns),
        TensorSpec("model.layers.1.moe.up_proj.weight", (4, 6, 8), Role.FFN, (Cut(0, "ep"), Cut(1, "tp"))),
        TensorSpec("model.layers.1.moe.down_proj.weight", (4, 8, 6), Role.FFN, (Cut(0, "ep"), Cut(2, "tp"))),
        TensorSpec("model.layers.1.share_expert.up_proj.weight", (6, 8), Role.FFN, ranks),
    ]
    for expert in range(4):
        name = f"model.layers.2.mlp.experts.{expert}.up_proj.weight"
        found.append(TensorSpec(name, (6, 8), Role.FFN, (Cut(0, "tp"),), expert=expert))
    return found


@pytest.fixture(params=["llama", "qwen3moe"])
def tiny_gguf(request: pytest.FixtureRequest, tmp_path: Path) -> TinyGguf:
    return TinyGguf(tmp_path / "tiny.gguf", request.param)


@pytest.fixture
def tiny_llama(tmp_path: Path) -> TinyGguf:
    return TinyGguf(tmp_path / "llama.gguf", "llama")
