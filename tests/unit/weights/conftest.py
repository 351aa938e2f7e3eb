from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from afd.types import Cut, Role, TensorSpec
from afd.weights.gguf import rope_rows


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


class TinyGguf:
    """A GGUF written by the `gguf` package as llama.cpp's converter would, beside the Hugging Face tensors it holds."""

    def __init__(self, path: Path, arch: str) -> None:
        self.path = path
        rng = np.random.default_rng(0)
        moe = arch == "qwen3moe"
        self.writer = gguf.GGUFWriter(path, arch)
        self.writer.add_block_count(1)
        self.writer.add_context_length(128)
        self.writer.add_embedding_length(32)
        self.writer.add_feed_forward_length(64)
        self.writer.add_head_count(4)
        self.writer.add_head_count_kv(2)
        self.writer.add_key_length(16)
        self.writer.add_layer_norm_rms_eps(1e-5)
        self.writer.add_rope_freq_base(10000.0)
        self.hf = {
            "model.embed_tokens.weight": rng.standard_normal((40, 32), np.float32),
            "model.norm.weight": rng.standard_normal(32, np.float32),
            "model.layers.0.self_attn.q_proj.weight": rng.standard_normal((64, 32), np.float32),
            "model.layers.0.self_attn.k_proj.weight": rng.standard_normal((32, 32), np.float32),
        }
        self._add("token_embd.weight", "model.embed_tokens.weight")
        self._add("output_norm.weight", "model.norm.weight")
        self._add("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight", heads=0 if moe else 4)
        self._add("blk.0.attn_k.weight", "model.layers.0.self_attn.k_proj.weight", heads=0 if moe else 2)
        if moe:
            self.writer.add_expert_count(3)
            self.writer.add_expert_used_count(2)
            self.writer.add_expert_feed_forward_length(8)
            stack = rng.standard_normal((3, 8, 32), np.float32)
            self.writer.add_tensor("blk.0.ffn_gate_exps.weight", stack)
            for expert in range(3):
                self.hf[f"model.layers.0.mlp.experts.{expert}.gate_proj.weight"] = stack[expert]

    def _add(self, name: str, hf_name: str, heads: int = 0) -> None:
        values = self.hf[hf_name]
        if heads:
            stored = np.empty_like(values)
            stored[rope_rows(len(values), heads)] = values
            values = stored
        self.writer.add_tensor(name, values)

    def write(self) -> Path:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()
        return self.path


@pytest.fixture(params=["llama", "qwen3moe"])
def tiny_gguf(request: pytest.FixtureRequest, tmp_path: Path) -> TinyGguf:
    return TinyGguf(tmp_path / "tiny.gguf", request.param)


@pytest.fixture
def tiny_llama(tmp_path: Path) -> TinyGguf:
    return TinyGguf(tmp_path / "llama.gguf", "llama")
