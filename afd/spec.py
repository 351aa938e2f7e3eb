"""What a model is, in sizes, read from a Hugging Face config.json. The description itself is afd.model_spec's.

Knows shapes and counts, no tensors. What can be planned but not served is read by afd.described.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict

from afd.attention_spec import AttentionSpec as AttentionSpec
from afd.attention_spec import HybridSpec as HybridSpec
from afd.errors import UnsupportedModel
from afd.hf_config import HfConfig
from afd.model_spec import ModelSpec as ModelSpec
from afd.model_spec import MoeSpec as MoeSpec
from afd.rope_spec import RopeSpec as RopeSpec
from afd.rope_spec import read_rope


def digest(spec: ModelSpec) -> str:
    """sha256 (hex) over the canonical JSON of `spec`: equal on two machines exactly when the specs are."""
    text = json.dumps(asdict(spec), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def from_config(config: Mapping[str, object]) -> ModelSpec:
    """Reads a Hugging Face config.json (already parsed). Raises UnsupportedModel, naming the key, for an unknown
    model_type, a missing or ill-typed key, and every feature that would change the result and is not implemented."""
    read = HfConfig(config)
    name = read.text("model_type")
    if name not in READERS:
        raise UnsupportedModel(f"model_type {name!r} is not supported; choose a model of {', '.join(READERS)}")
    return READERS[name](read)


def _step3_vl(outer: HfConfig) -> ModelSpec:
    return _step3(outer.nested("text_config", inherit=("eos_token_id", "tie_word_embeddings", "quantization_config")))


def _step3(read: HfConfig) -> ModelSpec:
    refuse_unsupported(read)
    read.refuse("num_attention_groups", 1, because="MFA here has one key and one value head", costs=True)
    read.refuse("sliding_window", because="only full attention is implemented", costs=True)
    layers = read.integer("num_hidden_layers")
    heads, head_dim = read.integer("num_attention_heads"), _even(read, read.integer("head_dim"))
    context = read.integer(
        "max_position_embedding" if read.has("max_position_embedding") else "max_position_embeddings"
    )
    moe = None
    if experts := read.integer("moe_num_experts", 0, minimum=0):
        moe = moe_of(
            read,
            MoeSpec(
                layers=layer_indices(read, "moe_layers_enum", layers, default=tuple(range(1, layers))),
                experts=experts,
                top_k=read.integer("moe_top_k"),
                intermediate=read.integer("moe_intermediate_size"),
                shared_intermediate=read.integer("share_expert_dim", 0, minimum=0),
                renormalise=read.flag("norm_expert_weight", False),
            ),
        )
    attention = AttentionSpec("mfa", heads, 1, head_dim, q_rank=read.integer("share_q_dim"))
    return decoder(read, "step3", attention, context, moe)


def _llama(read: HfConfig) -> ModelSpec:
    refuse_unsupported(read)
    read.refuse("mlp_bias", False, because="FFN projections with biases are not implemented")
    read.refuse("rope_interleaved", False, because="rotary pairs are (i, i + dim/2) here")
    if read.flag("use_sliding_window", True):
        read.refuse("sliding_window", because="only full attention is implemented", costs=True)
    return decoder(read, "llama", gqa(read, qk_norm=False), read.integer("max_position_embeddings"), None)


def _qwen3_moe(read: HfConfig) -> ModelSpec:
    refuse_unsupported(read)
    read.refuse("use_sliding_window", False, because="only full attention is implemented", costs=True)
    layers = read.integer("num_hidden_layers")
    dense = layer_indices(read, "mlp_only_layers", layers, default=())
    step = read.integer("decoder_sparse_step", 1)
    moe = None
    if experts := read.integer("num_local_experts" if read.has("num_local_experts") else "num_experts", minimum=0):
        moe = moe_of(
            read,
            MoeSpec(
                layers=tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0),
                experts=experts,
                top_k=read.integer("num_experts_per_tok"),
                intermediate=read.integer("moe_intermediate_size"),
                shared_intermediate=0,
                renormalise=read.flag("norm_topk_prob", False),
            ),
        )
    return decoder(read, "qwen3_moe", gqa(read, qk_norm=True), read.integer("max_position_embeddings"), moe)


READERS: dict[str, Callable[[HfConfig], ModelSpec]] = {
    "step3_text": _step3,
    "step3_vl": _step3_vl,
    "llama": _llama,
    "qwen3_moe": _qwen3_moe,
}


def decoder(read: HfConfig, family: str, attention: AttentionSpec, context: int, moe: MoeSpec | None) -> ModelSpec:
    layers = read.integer("num_hidden_layers")
    all_moe = moe is not None and len(moe.layers) == layers
    return ModelSpec(
        family=family,
        layers=layers,
        hidden=read.integer("hidden_size"),
        vocab=read.integer("vocab_size"),
        max_context=context,
        norm_eps=read.number("rms_norm_eps", None if family == "step3" and read.serving else 1e-6),
        tied_head=read.flag("tie_word_embeddings", False),
        attention=attention,
        rope=_rope(read, attention.head_dim, context, default_theta=None if family == "step3" else 10_000.0),
        dense_intermediate=read.integer("intermediate_size", 0 if all_moe else None, minimum=0 if all_moe else 1),
        moe=moe,
        eos_token_ids=read.integers("eos_token_id"),
    )


def _rope(read: HfConfig, head_dim: int, context: int, default_theta: float | None) -> RopeSpec:
    """Costs nothing: of a model that is only described it is not read."""
    return read_rope(read, head_dim, context, default_theta) if read.serving else RopeSpec(head_dim, 10_000.0)


def gqa(read: HfConfig, *, qk_norm: bool) -> AttentionSpec:
    heads = read.integer("num_attention_heads")
    kv_heads = read.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise UnsupportedModel(
            f"{read.where} has {heads} num_attention_heads over {kv_heads} num_key_value_heads, which do not divide"
        )
    hidden = read.integer("hidden_size")
    if not read.has("head_dim") and hidden % heads:
        raise UnsupportedModel(
            f"{read.where} has no head_dim, and hidden_size {hidden} does not divide over {heads} heads"
        )
    return AttentionSpec(
        "gqa", heads, kv_heads, _even(read, read.integer("head_dim", hidden // heads)), qk_norm=qk_norm
    )


def moe_of(read: HfConfig, moe: MoeSpec) -> MoeSpec | None:
    if moe.top_k > moe.experts:
        raise UnsupportedModel(f"{read.where} sends each token to {moe.top_k} of only {moe.experts} experts")
    return moe if moe.layers else None


def layer_indices(read: HfConfig, key: str, layers: int, default: tuple[int, ...]) -> tuple[int, ...]:
    found = tuple(sorted(set(read.integers(key, default))))
    if found and found[-1] >= layers:
        raise UnsupportedModel(f"{read.where} has layer {found[-1]} in {key}, but only {layers} layers")
    return found


def _even(read: HfConfig, head_dim: int) -> int:
    if head_dim % 2:
        raise UnsupportedModel(f"{read.where} has head_dim {head_dim}, which rotary embedding cannot split into pairs")
    return head_dim


def refuse_unsupported(read: HfConfig) -> None:
    read.refuse("hidden_act", "silu", "swish", because="experts and dense layers here are SwiGLU with SiLU")
    read.refuse("attention_bias", False, because="attention projections with biases are not implemented")
    read.refuse("quantization_config", because="only fp32, fp16 and bf16 checkpoints are read")
    read.refuse("partial_rotary_factor", 1, because="rotary embedding here covers the whole head")
