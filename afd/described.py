"""Any model whose config.json says enough to cost it: those that are served, and others whose halves nobody here
implements (multi-head latent attention, chunked and linear hybrids).

`afd.spec.from_config` is for serving, and refuses what would change a result; `describe` refuses only what would
change a cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from afd.attention_spec import AttentionSpec, HybridSpec
from afd.errors import UnsupportedModel
from afd.hf_config import HfConfig
from afd.model_spec import ModelSpec, MoeSpec
from afd.spec import READERS, decoder, gqa, layer_indices, moe_of


def describe(config: Mapping[str, object]) -> ModelSpec:
    """Reads a parsed config.json. Raises UnsupportedModel, naming the key, for an unknown model_type, a missing or
    ill-typed size, and what would change the model's cost and is not known here."""
    read = HfConfig(config, serving=False)
    name = read.text("model_type")
    readers = {**READERS, **_READERS}
    if name not in readers:
        raise UnsupportedModel(f"model_type {name!r} cannot be costed; choose a model of {', '.join(readers)}")
    return readers[name](read)


def _deepseek(read: HfConfig) -> ModelSpec:
    """DeepSeek-V2 and V3, Kimi-K2: latent attention, the first layers dense."""
    layers = read.integer("num_hidden_layers")
    attention = AttentionSpec(
        "mla",
        heads=read.integer("num_attention_heads"),
        kv_heads=1,
        head_dim=read.integer("qk_nope_head_dim"),
        q_rank=read.integer("q_lora_rank", 0, minimum=0),
        kv_rank=read.integer("kv_lora_rank"),
        rope_dim=read.integer("qk_rope_head_dim"),
        v_dim=read.integer("v_head_dim"),
    )
    first, every = read.integer("first_k_dense_replace", 0, minimum=0), read.integer("moe_layer_freq", 1)
    moe = None
    if read.has("n_routed_experts"):
        width = read.integer("moe_intermediate_size")
        moe = _moe(
            read,
            tuple(layer for layer in range(first, layers) if layer % every == 0),
            experts=read.integer("n_routed_experts"),
            top_k=read.integer("num_experts_per_tok"),
            width=width,
            shared=width * read.integer("n_shared_experts", 0, minimum=0),
        )
    return decoder(read, "deepseek", attention, read.integer("max_position_embeddings"), moe)


def _qwen3(read: HfConfig) -> ModelSpec:
    read.refuse("use_sliding_window", False, because="its window is not costed", costs=True)
    return decoder(read, "qwen3", gqa(read, qk_norm=True), read.integer("max_position_embeddings"), None)


def _mixtral(read: HfConfig) -> ModelSpec:
    read.refuse("sliding_window", because="its window is not costed", costs=True)
    moe = _moe(
        read,
        tuple(range(read.integer("num_hidden_layers"))),
        experts=read.integer("num_local_experts"),
        top_k=read.integer("num_experts_per_tok"),
        width=read.integer("intermediate_size"),
    )
    return decoder(read, "mixtral", gqa(read, qk_norm=False), read.integer("max_position_embeddings"), moe)


def _llama4(read: HfConfig) -> ModelSpec:
    """Every fourth layer sees all (no_rope_layers 0); the others their chunk. `intermediate_size` is an expert's."""
    layers, width = read.integer("num_hidden_layers"), read.integer("intermediate_size")
    step = read.integer("interleave_moe_layer_step", 1)
    listed = layer_indices(read, "moe_layers", layers, default=tuple(range(step - 1, layers, step)))
    moe = _moe(
        read,
        listed,
        experts=read.integer("num_local_experts"),
        top_k=read.integer("num_experts_per_tok"),
        width=width,
        shared=width,
    )
    with_rope = read.integers("no_rope_layers") or tuple(int((layer + 1) % 4 != 0) for layer in range(layers))
    chunked = tuple(layer for layer, rope in enumerate(with_rope) if rope)
    spec = decoder(read, "llama4", gqa(read, qk_norm=False), read.integer("max_position_embeddings"), moe)
    hybrid = HybridSpec("chunked", chunked, read.integer("attention_chunk_size", 8192))
    return replace(spec, dense_intermediate=read.integer("intermediate_size_mlp"), hybrid=hybrid)


def _llama4_outer(outer: HfConfig) -> ModelSpec:
    return _llama4(outer.nested("text_config", inherit=("tie_word_embeddings",)))


def _minimax(read: HfConfig) -> ModelSpec:
    """attn_type_list: 1 for full attention, 0 for lightning."""
    layers = read.integer("num_hidden_layers")
    moe = _moe(
        read,
        tuple(range(layers)),
        experts=read.integer("num_local_experts"),
        top_k=read.integer("num_experts_per_tok"),
        width=read.integer("intermediate_size"),
        shared=read.integer("shared_intermediate_size", 0, minimum=0),
    )
    kinds = read.integers("attn_type_list")
    if len(kinds) != layers:
        raise UnsupportedModel(f"{read.where} has {len(kinds)} attn_type_list entries for {layers} layers")
    linear = tuple(layer for layer, kind in enumerate(kinds) if kind == 0)
    spec = decoder(read, "minimax", gqa(read, qk_norm=False), read.integer("max_position_embeddings"), moe)
    return replace(spec, hybrid=HybridSpec("linear", linear) if linear else None)


def _ernie(read: HfConfig) -> ModelSpec:
    layers = read.integer("num_hidden_layers")
    first, step = read.integer("moe_layer_start_index", 0, minimum=0), read.integer("moe_layer_interval", 1)
    last = layers - 1
    if read.has("moe_layer_end_index") and read.integer("moe_layer_end_index", minimum=-1) >= 0:
        last = read.integer("moe_layer_end_index", minimum=0)
    width = read.integer("moe_intermediate_size")
    moe = _moe(
        read,
        tuple(layer for layer in range(layers) if first <= layer <= last and (layer + 1) % step == 0),
        experts=read.integer("moe_num_experts"),
        top_k=read.integer("moe_k"),
        width=width,
        shared=width * read.integer("moe_num_shared_experts", 0, minimum=0),
    )
    return decoder(read, "ernie", gqa(read, qk_norm=False), read.integer("max_position_embeddings"), moe)


def _pangu(read: HfConfig) -> ModelSpec:
    moe = _moe(
        read,
        tuple(range(read.integer("num_hidden_layers"))),
        experts=read.integer("num_experts"),
        top_k=read.integer("num_experts_per_tok"),
        width=read.integer("moe_intermediate_size"),
        shared=read.integer("shared_expert_intermediate_size", 0, minimum=0),
    )
    return decoder(read, "pangu", gqa(read, qk_norm=False), read.integer("max_position_embeddings"), moe)


def _moe(
    read: HfConfig, layers: tuple[int, ...], *, experts: int, top_k: int, width: int, shared: int = 0
) -> MoeSpec | None:
    return moe_of(read, MoeSpec(layers, experts, top_k, width, shared, renormalise=False))  # which costs nothing


_READERS: dict[str, Callable[[HfConfig], ModelSpec]] = {
    "qwen3": _qwen3,
    "mixtral": _mixtral,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "kimi_k2": _deepseek,
    "llama4": _llama4_outer,
    "llama4_text": _llama4,
    "minimax_m1": _minimax,
    "ernie4_5_moe": _ernie,
    "PanguProMoE": _pangu,
}
