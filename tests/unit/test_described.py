"""config.json of models that are planned but not served: the same costs as the built-in descriptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from afd.described import describe
from afd.errors import ModelError, UnsupportedModel
from afd.planner.models import MODELS, find
from afd.spec import from_config
from afd.types import DType, Role

_SAME: dict[str, Any] = {"rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "hidden_act": "silu"}


def _deepseek(heads: int, experts: int, dense: int, vocab: int) -> dict[str, Any]:
    return _SAME | {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 61,
        "hidden_size": 7168,
        "num_attention_heads": heads,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": dense,
        "moe_layer_freq": 1,
        "vocab_size": vocab,
        "quantization_config": {"quant_method": "fp8"},
        "rope_scaling": {"type": "yarn", "factor": 40, "unheard_of": 1},
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek-v3": _deepseek(128, 256, 3, 129280),
    "kimi-k2": _deepseek(64, 384, 1, 163840) | {"model_type": "kimi_k2"},
    "qwen3-32b": _SAME
    | {
        "model_type": "qwen3",
        "num_hidden_layers": 64,
        "hidden_size": 5120,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 25600,
        "vocab_size": 151936,
    },
    "llama4-maverick": {
        "model_type": "llama4",
        "text_config": _SAME
        | {
            "model_type": "llama4_text",
            "num_hidden_layers": 48,
            "hidden_size": 5120,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 8192,
            "intermediate_size_mlp": 16384,
            "num_local_experts": 128,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 8192,
            "no_rope_layers": [],
            "vocab_size": 202048,
        },
    },
    "minimax-m1": _SAME
    | {
        "model_type": "minimax_m1",
        "num_hidden_layers": 80,
        "hidden_size": 6144,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 9216,
        "num_local_experts": 32,
        "num_experts_per_tok": 2,
        "attn_type_list": [0, 0, 0, 0, 0, 0, 0, 1] * 10,
        "vocab_size": 200064,
    },
    "ernie-4.5": _SAME
    | {
        "model_type": "ernie4_5_moe",
        "num_hidden_layers": 54,
        "hidden_size": 8192,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 28672,
        "moe_intermediate_size": 3584,
        "moe_num_experts": 64,
        "moe_k": 8,
        "moe_layer_start_index": 3,
        "moe_layer_interval": 1,
        "vocab_size": 103424,
    },
    "pangu-pro": _SAME
    | {
        "model_type": "PanguProMoE",
        "num_hidden_layers": 48,
        "hidden_size": 5120,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1344,
        "shared_expert_intermediate_size": 4 * 1344,
        "vocab_size": 153376,
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_costs_what_the_built_in_description_does(name: str) -> None:
    read, known = describe(CONFIGS[name]), MODELS[name].spec
    for context in (8192, 32768):
        assert read.kv_bytes(context, DType.BF16, DType.FP8) == known.kv_bytes(context, DType.BF16, DType.FP8)
        assert read.attention_flops_per_token(context) == known.attention_flops_per_token(context)
    assert read.linear_flops_per_token == known.linear_flops_per_token
    assert read.ffn_flops_per_token == known.ffn_flops_per_token
    assert read.parameters(Role.FFN) == known.parameters(Role.FFN)
    assert read.weight_bytes(Role.ATTENTION, DType.FP8) == pytest.approx(
        known.weight_bytes(Role.ATTENTION, DType.FP8), rel=1e-3
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_only_described_cannot_be_served(name: str) -> None:
    with pytest.raises(UnsupportedModel, match="is not supported; choose a model of step3_text"):
        from_config(CONFIGS[name])


def test_deepseek_v3_has_671_billion_parameters() -> None:
    spec = MODELS["deepseek-v3"].spec
    assert spec.parameters(Role.ATTENTION) + spec.parameters(Role.FFN) == pytest.approx(671e9, rel=0.005)


def test_a_linear_layers_state_is_held_once_and_moved_twice_whatever_the_context() -> None:
    spec = MODELS["minimax-m1"].spec
    state = 70 * 64 * 128 * 128 * 4
    assert spec.kv_bytes(0, DType.BF16) == 2 * state
    assert spec.held_bytes(0, DType.BF16) == state
    assert spec.kv_bytes(1000, DType.BF16) - spec.kv_bytes(0, DType.BF16) == 1000 * spec.kv_bytes_per_token(DType.BF16)


def test_a_quantised_checkpoint_of_a_served_family_is_described_and_a_sliding_window_is_not() -> None:
    llama = _SAME | {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 100,
    }
    with pytest.raises(UnsupportedModel, match="quantization_config"):
        from_config(llama | {"quantization_config": {"quant_method": "fp8"}})
    assert describe(llama | {"quantization_config": {"quant_method": "fp8"}}).layers == 2
    with pytest.raises(UnsupportedModel, match="sliding_window"):
        describe(llama | {"sliding_window": 4096})


def test_a_model_type_that_nobody_knows_is_answered_with_the_choices() -> None:
    with pytest.raises(UnsupportedModel, match=r"'mamba' cannot be costed.*step3_text.*deepseek_v3.*minimax_m1"):
        describe({"model_type": "mamba"})


def test_the_planner_finds_models_by_name_by_config_and_by_folder(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIGS["deepseek-v3"]))
    for given in (str(file), str(tmp_path)):
        assert find(given).spec.ffn_flops_per_token == find("deepseek-v3").spec.ffn_flops_per_token
    with pytest.raises(ModelError, match="unknown model 'nosuch'; known to the planner are step3, "):
        find("nosuch")
    file.write_text("[1]")
    with pytest.raises(ModelError, match="holds a list"):
        find(str(file))
