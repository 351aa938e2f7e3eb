"""ModelSpec: read from config.json, refused with a sentence where it cannot be served, and costed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from afd.errors import UnsupportedModel
from afd.spec import AttentionSpec, ModelSpec, MoeSpec, RopeSpec, digest, from_config
from afd.types import DType, Role

STEP3: dict[str, Any] = {
    "model_type": "step3_text",
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 64,
    "num_attention_groups": 1,
    "head_dim": 256,
    "share_q_dim": 2048,
    "intermediate_size": 18432,
    "moe_num_experts": 48,
    "moe_top_k": 3,
    "moe_intermediate_size": 5120,
    "share_expert_dim": 5120,
    "norm_expert_weight": True,
    "moe_layers_enum": ",".join(map(str, range(4, 60))),
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000,
    "rope_scaling": None,
    "max_position_embedding": 65536,
    "vocab_size": 128815,
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "max_position_embeddings": 8192,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
QWEN3_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 4096,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 12288,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1536,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "use_sliding_window": False,
    "sliding_window": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
    "vocab_size": 151936,
    "eos_token_id": [151645, 151643],
}


def dense(layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int, moe: MoeSpec | None) -> ModelSpec:
    attention = AttentionSpec("gqa", heads, kv_heads, 128)
    rope = RopeSpec(128, 1e4)
    return ModelSpec("llama", layers, hidden, 1000, 32768, 1e-6, False, attention, rope, intermediate, moe)


# Step-3 report, tables 2 and 3: KV bytes (FP8), attention, linear and FFN FLOPs per decoded token at 8K and 32K.
REPORT = {
    "step3": (from_config(STEP3), (2.56e8, 3.27e10, 2.07e10, 5.33e10), (1.02e9, 1.31e11, 2.07e10, 5.33e10)),
    "qwen3-235b": (from_config(QWEN3_MOE), (7.89e8, 2.52e10, 1.34e10, 2.84e10), (3.15e9, 1.01e11, 1.34e10, 2.84e10)),
    "qwen3-32b": (
        dense(64, 5120, 64, 8, 25600, None),
        (1.07e9, 1.72e10, 1.21e10, 5.03e10),
        (4.29e9, 6.87e10, 1.21e10, 5.03e10),
    ),
    "ernie-4.5": (
        dense(54, 8192, 64, 8, 28672, MoeSpec(tuple(range(3, 54)), 64, 8, 3584, 0, True)),
        (9.06e8, 1.45e10, 1.63e10, 7.61e10),
        (3.62e9, 5.80e10, 1.63e10, 7.61e10),
    ),
    "pangu-pro": (
        dense(48, 5120, 40, 8, 0, MoeSpec(tuple(range(48)), 64, 8, 1344, 4 * 1344, True)),
        (8.05e8, 8.05e9, 6.04e9, 2.38e10),
        (3.22e9, 3.22e10, 6.04e9, 2.38e10),
    ),
}


@pytest.mark.parametrize("name", REPORT)
def test_costs_are_those_of_the_step3_report(name: str) -> None:
    spec, *tables = REPORT[name]
    for context, expected in zip((8192, 32768), tables, strict=True):
        costs = (
            spec.kv_bytes_per_token(DType.BF16) / 2 * context,  # the report keeps one byte per number
            spec.attention_flops_per_token(context),
            spec.linear_flops_per_token,
            spec.ffn_flops_per_token,
        )
        assert costs == pytest.approx(expected, rel=0.005)


def test_step3_has_316_billion_parameters_of_which_one_token_uses_38() -> None:
    spec = from_config(STEP3)
    assert spec.parameters(Role.ATTENTION) + spec.parameters(Role.FFN) == pytest.approx(316e9, rel=0.005)
    active = (spec.half_flops_per_token(Role.ATTENTION, 0) + spec.half_flops_per_token(Role.FFN, 0)) / 2
    assert active == pytest.approx(38e9, rel=0.01)
    assert spec.weight_bytes(Role.FFN, DType.BF16) == 2 * spec.parameters(Role.FFN)
    assert spec.weight_bytes(Role.FFN, DType.BF16) / 2 == pytest.approx(300e9, rel=0.02)  # FP8: "about 300 GB"


def test_wire_bytes_are_those_of_the_step3_report() -> None:
    """Section 7, 2A2F at 4K: 128 tokens per pair of cards are 896 KiB out in FP8 (half of BF16) and 1.75 MiB back."""
    spec = from_config(STEP3)
    assert 128 * spec.dispatch_bytes_per_token(0, DType.BF16) / 2 == 896 * 1024
    assert 128 * spec.combine_bytes_per_token(DType.BF16) == 1.75 * 1024**2
    assert spec.dispatch_bytes_per_token(4, DType.BF16) - spec.dispatch_bytes_per_token(0, DType.BF16) == 3 * (4 + 4)
    assert spec.wire_bytes_per_token(DType.BF16) == 61 * 2 * 7168 * 2 + 56 * 24
    assert spec.wire_bytes_per_token(DType.BF16, num_ffn=4) == 4 * spec.wire_bytes_per_token(DType.BF16)


def test_step3_is_read_with_every_size_in_its_place() -> None:
    spec = from_config(STEP3)
    assert spec.family == "step3"
    assert spec.attention == AttentionSpec("mfa", heads=64, kv_heads=1, head_dim=256, q_rank=2048)
    assert spec.rope == RopeSpec(dim=256, theta=500000.0)
    assert spec.moe == MoeSpec(tuple(range(4, 60)), 48, 3, 5120, 5120, renormalise=True)
    assert (spec.layers, spec.hidden, spec.vocab, spec.max_context) == (61, 7168, 128815, 65536)
    assert not spec.is_moe(3)
    assert spec.is_moe(4)
    assert not spec.is_moe(60)
    assert spec.eos_token_ids == ()


def test_step3_without_moe_layers_enum_has_experts_everywhere_but_in_layer_0() -> None:
    spec = from_config({k: v for k, v in STEP3.items() if k != "moe_layers_enum"})
    assert spec.moe_layers == tuple(range(1, 61))


@pytest.mark.parametrize("listed", ["4, 5,6", [6, 5, 4], (4, 5, 6)])
def test_moe_layers_are_read_from_text_and_lists_alike(listed: object) -> None:
    assert from_config(STEP3 | {"moe_layers_enum": listed}).moe_layers == (4, 5, 6)


def test_the_language_model_of_a_vision_checkpoint_is_the_nested_one() -> None:
    outer = {"model_type": "step3_vl", "text_config": STEP3, "vision_config": {"width": 1792}, "eos_token_id": [5, 6]}
    spec = from_config(outer)
    assert spec.eos_token_ids == (5, 6)
    assert from_config(outer | {"eos_token_id": None}) == from_config(STEP3)
    with pytest.raises(UnsupportedModel, match="text_config"):
        from_config({"model_type": "step3_vl"})


def test_llama_derives_its_head_dim_and_ties_its_head() -> None:
    spec = from_config(LLAMA)
    assert spec.attention == AttentionSpec("gqa", heads=9, kv_heads=3, head_dim=64)
    assert spec.tied_head
    assert spec.moe is None
    assert (spec.num_experts, spec.top_k, spec.moe_layers) == (0, 0, ())
    assert spec.eos_token_ids == (2,)


def test_qwen3_moe_mixes_dense_layers_in_as_its_config_says() -> None:
    spec = from_config(QWEN3_MOE | {"num_hidden_layers": 6, "mlp_only_layers": [3], "decoder_sparse_step": 2})
    assert spec.moe_layers == (1, 5)
    assert spec.attention.qk_norm
    assert from_config(QWEN3_MOE | {"num_hidden_layers": 2, "mlp_only_layers": [0, 1]}).moe is None
    renamed = {("num_local_experts" if k == "num_experts" else k): v for k, v in QWEN3_MOE.items()}
    assert from_config(renamed) == from_config(QWEN3_MOE)


ROPE: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 2048, "beta_fast": 16.0, "mscale": 1.0},
    "longrope": {
        "short_factor": [1.0] * 32,
        "long_factor": [2.0] * 32,
        "original_max_position_embeddings": 4096,
    },
}


@pytest.mark.parametrize("kind", ROPE)
def test_old_and_new_ways_to_write_rope_give_the_same_spec(kind: str) -> None:
    new = {k: v for k, v in LLAMA.items() if k != "rope_theta"}
    specs = [
        from_config(LLAMA | {"rope_scaling": {"type": kind, **ROPE[kind]}}),
        from_config(LLAMA | {"rope_scaling": {"rope_type": kind, **ROPE[kind]}}),
        from_config(new | {"rope_parameters": {"rope_type": kind, "rope_theta": 100000.0, **ROPE[kind]}}),
    ]
    assert specs[0] == specs[1] == specs[2]
    assert specs[0].rope.kind == kind
    assert specs[0].rope.theta == 100000.0


def test_a_missing_rope_factor_is_the_growth_of_the_context() -> None:
    assert from_config(LLAMA | {"rope_scaling": {"type": "longrope", **ROPE["longrope"]}}).rope.factor == 2.0


def test_an_unknown_model_type_is_answered_with_the_choices() -> None:
    with pytest.raises(UnsupportedModel, match=r"'mamba'.*step3_text, step3_vl, llama, qwen3_moe"):
        from_config({"model_type": "mamba"})


@pytest.mark.parametrize(
    "config", [STEP3, LLAMA, QWEN3_MOE | {"mlp_only_layers": [0]}], ids=["step3", "llama", "qwen3_moe"]
)
def test_a_missing_or_ill_typed_size_names_its_key(config: dict[str, Any]) -> None:
    for key in ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "intermediate_size"):
        with pytest.raises(UnsupportedModel, match=key):
            from_config({k: v for k, v in config.items() if k != key})
        for wrong in ("many", 0, 3.5, True, [4]):
            with pytest.raises(UnsupportedModel, match=key):
                from_config(config | {key: wrong})


@pytest.mark.parametrize(
    ("config", "changes", "named"),
    [
        (LLAMA, {"attention_bias": True}, "attention_bias"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act"),
        (LLAMA, {"sliding_window": 4096}, "sliding_window"),
        (LLAMA, {"rope_interleaved": True}, "rope_interleaved"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        (LLAMA, {"num_key_value_heads": 2}, "num_key_value_heads"),
        (LLAMA, {"head_dim": 63}, "head_dim"),
        (LLAMA, {"num_attention_heads": 7, "num_key_value_heads": 7}, "head_dim"),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic.*longrope"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "factor"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0, "surprise": 1}}, "surprise"),
        (LLAMA, {"rope_scaling": {"type": "longrope", **ROPE["longrope"], "short_factor": [1.0]}}, "short_factor"),
        (LLAMA, {"rope_scaling": {"type": "llama3", **ROPE["llama3"], "high_freq_factor": 1.0}}, "high_freq_factor"),
        (LLAMA, {"rope_scaling": "linear"}, "rope_scaling"),
        (LLAMA, {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        (LLAMA, {"eos_token_id": "</s>"}, "eos_token_id"),
        (QWEN3_MOE, {"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window"),
        (QWEN3_MOE, {"num_experts_per_tok": 129}, "129 of only 128"),
        (QWEN3_MOE, {"mlp_only_layers": [94]}, "mlp_only_layers"),
        (STEP3, {"num_attention_groups": 2}, "num_attention_groups"),
        (STEP3, {"moe_layers_enum": "4,61"}, "moe_layers_enum"),
        (STEP3, {"moe_layers_enum": "4,five"}, "moe_layers_enum"),
        (STEP3, {"rope_theta": None}, "rope_theta"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) and len(value) < 4 else "",
)
def test_what_cannot_be_served_is_refused_by_name(config: dict[str, Any], changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        from_config(config | changes)


def test_a_dense_width_is_not_needed_where_every_layer_has_experts() -> None:
    assert from_config({k: v for k, v in QWEN3_MOE.items() if k != "intermediate_size"}).dense_intermediate == 0


def test_harmless_settings_are_not_refused() -> None:
    plain = from_config(LLAMA)
    harmless: dict[str, Any] = {
        "attention_bias": False,
        "hidden_act": "silu",
        "rope_interleaved": False,
        "rope_scaling": None,
    }
    assert from_config(LLAMA | harmless | {"attention_dropout": 0.1, "partial_rotary_factor": 1.0}) == plain
    assert from_config(LLAMA | {"use_sliding_window": False, "sliding_window": 4096}) == plain


def test_the_digest_tells_two_specs_apart_and_survives_a_round_trip() -> None:
    spec = from_config(STEP3)
    assert digest(spec) == digest(from_config(json.loads(json.dumps(STEP3))))
    assert len(digest(spec)) == 64
    others: list[dict[str, Any]] = [
        {"rms_norm_eps": 1e-6},
        {"norm_expert_weight": False},
        {"rope_theta": 10000},
        {"moe_top_k": 2},
    ]
    assert len({digest(spec), *(digest(from_config(STEP3 | other)) for other in others)}) == 5
