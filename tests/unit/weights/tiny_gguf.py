from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from afd.weights.gguf import rope_rows


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
