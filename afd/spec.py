"""What a model is, in sizes: read from a Hugging Face config.json, and what each half of it costs.

Knows shapes and counts, no tensors. `ModelSpec` is the one description that serving, loading and planning share.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from afd.errors import UnsupportedModel
from afd.hf_config import HfConfig
from afd.rope_spec import RopeSpec as RopeSpec
from afd.rope_spec import read_rope
from afd.types import DType, Role


@dataclass(frozen=True)
class AttentionSpec:
    """kind "gqa": q, k and v projections. "mfa": q through rank `q_rank`, one KV head (report section 4)."""

    kind: Literal["gqa", "mfa"]
    heads: int
    kv_heads: int
    head_dim: int
    q_rank: int = 0
    qk_norm: bool = False


@dataclass(frozen=True)
class MoeSpec:
    """`layers` are the layer indices with experts; the others are dense. shared_intermediate 0: no shared expert."""

    layers: tuple[int, ...]
    experts: int
    top_k: int
    intermediate: int
    shared_intermediate: int
    renormalise: bool  # the chosen weights are made to sum to 1


@dataclass(frozen=True)
class ModelSpec:
    """Everything that serving needs to know of a model before it reads a tensor."""

    family: str
    layers: int
    hidden: int
    vocab: int
    max_context: int
    norm_eps: float
    tied_head: bool
    attention: AttentionSpec
    rope: RopeSpec
    dense_intermediate: int
    moe: MoeSpec | None = None
    eos_token_ids: tuple[int, ...] = ()

    def is_moe(self, layer: int) -> bool:
        """Whether `layer` has experts."""
        return self.moe is not None and layer in self.moe.layers

    @property
    def num_experts(self) -> int:
        return self.moe.experts if self.moe else 0

    @property
    def top_k(self) -> int:
        """Experts per token on MoE layers; 0 for a model without."""
        return self.moe.top_k if self.moe else 0

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return self.moe.layers if self.moe else ()

    def kv_bytes_per_token(self, dtype: DType) -> int:
        """Bytes of KV cache that one token of context takes, over all layers."""
        return self.layers * 2 * self.attention.kv_heads * self.attention.head_dim * dtype.itemsize

    # FLOPs of one decoded token over all layers, 2 per multiply-add (Step-3 report, section 4.1, which leaves out
    # norms, rotary embedding, gate and softmax: together well under 1 %).

    def attention_flops_per_token(self, context: int) -> int:
        """Scores and weighted values of one token that sees `context` tokens; no projections."""
        return self.layers * self.attention.heads * self.attention.head_dim * 4 * context

    @property
    def linear_flops_per_token(self) -> int:
        """The projections before and after attention."""
        return 2 * self.layers * self._projection_parameters

    @property
    def ffn_flops_per_token(self) -> int:
        """Dense layers, the top_k experts and the shared expert: the whole FFN half."""
        dense = (self.layers - len(self.moe_layers)) * self.dense_intermediate
        active = self.moe.top_k * self.moe.intermediate + self.moe.shared_intermediate if self.moe else 0
        return 2 * 3 * self.hidden * (dense + len(self.moe_layers) * active)

    @property
    def head_flops_per_token(self) -> int:
        """The LM head, for each token whose logits are wanted (the report leaves it out)."""
        return 2 * self.hidden * self.vocab

    def half_flops_per_token(self, role: Role, context: int) -> int:
        """All that one half computes for one decoded token; the attention half with its projections and LM head."""
        if role is Role.FFN:
            return self.ffn_flops_per_token
        return self.attention_flops_per_token(context) + self.linear_flops_per_token + self.head_flops_per_token

    def parameters(self, role: Role) -> int:
        """Numbers in the weights that a role holds (the FFN role: all its ranks together)."""
        moe, num_moe = self.moe, len(self.moe_layers)
        if role is Role.FFN:
            dense = (self.layers - num_moe) * self.dense_intermediate
            sparse = num_moe * (moe.experts * moe.intermediate + moe.shared_intermediate) if moe else 0
            return 3 * self.hidden * (dense + sparse)
        spec = self.attention
        norms = (
            2 * self.hidden + (2 * spec.head_dim if spec.qk_norm else 0) + (spec.q_rank if spec.kind == "mfa" else 0)
        )
        gates = num_moe * self.num_experts * self.hidden
        ends = self.vocab * self.hidden * (1 if self.tied_head else 2) + self.hidden
        return self.layers * (self._projection_parameters + norms) + gates + ends

    def weight_bytes(self, role: Role, dtype: DType) -> int:
        """Bytes of the weights a role holds (the FFN role: all its ranks together)."""
        return self.parameters(role) * dtype.itemsize

    def dispatch_bytes_per_token(self, layer: int, dtype: DType) -> int:
        """Bytes one token takes from attention to one FFN worker at `layer`: y, and on MoE layers an int32 id and a
        float32 weight for each of its experts. Frame headers not counted."""
        return self.hidden * dtype.itemsize + (8 * self.top_k if self.is_moe(layer) else 0)

    def combine_bytes_per_token(self, dtype: DType) -> int:
        """Bytes one token's partial sum takes from one FFN worker back to attention, at any layer."""
        return self.hidden * dtype.itemsize

    def wire_bytes_per_token(self, dtype: DType, num_ffn: int = 1) -> int:
        """Bytes one token moves both ways between attention and `num_ffn` FFN workers, over all layers, when every
        worker gets and answers every token (Step-3 report, section 3: all broadcast)."""
        out = sum(self.dispatch_bytes_per_token(layer, dtype) for layer in range(self.layers))
        return num_ffn * (out + self.layers * self.combine_bytes_per_token(dtype))

    @property
    def _projection_parameters(self) -> int:
        spec = self.attention
        q = spec.heads * spec.head_dim
        kv = spec.kv_heads * spec.head_dim
        into_q = self.hidden * spec.q_rank + spec.q_rank * q if spec.kind == "mfa" else self.hidden * q
        return into_q + 2 * self.hidden * kv + q * self.hidden


def digest(spec: ModelSpec) -> str:
    """sha256 (hex) over the canonical JSON of `spec`: equal on two machines exactly when the specs are."""
    text = json.dumps(asdict(spec), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def from_config(config: Mapping[str, object]) -> ModelSpec:
    """Reads a Hugging Face config.json (already parsed). Raises UnsupportedModel, naming the key, for an unknown
    model_type, a missing or ill-typed key, and every feature that would change the result and is not implemented."""
    read = HfConfig(config)
    name = read.text("model_type")
    if name not in _READERS:
        raise UnsupportedModel(f"model_type {name!r} is not supported; choose a model of {', '.join(_READERS)}")
    return _READERS[name](read)


def _step3_vl(outer: HfConfig) -> ModelSpec:
    return _step3(outer.nested("text_config", inherit=("eos_token_id", "tie_word_embeddings", "quantization_config")))


def _step3(read: HfConfig) -> ModelSpec:
    _refuse_unsupported(read)
    read.refuse("num_attention_groups", 1, because="MFA here has one key and one value head")
    read.refuse("sliding_window", because="only full attention is implemented")
    layers = read.integer("num_hidden_layers")
    heads, head_dim = read.integer("num_attention_heads"), _even(read, read.integer("head_dim"))
    context = read.integer(
        "max_position_embedding" if read.has("max_position_embedding") else "max_position_embeddings"
    )
    moe = None
    if experts := read.integer("moe_num_experts", 0, minimum=0):
        moe = _moe(
            read,
            MoeSpec(
                layers=_layer_indices(read, "moe_layers_enum", layers, default=tuple(range(1, layers))),
                experts=experts,
                top_k=read.integer("moe_top_k"),
                intermediate=read.integer("moe_intermediate_size"),
                shared_intermediate=read.integer("share_expert_dim", 0, minimum=0),
                renormalise=read.flag("norm_expert_weight", False),
            ),
        )
    attention = AttentionSpec("mfa", heads, 1, head_dim, q_rank=read.integer("share_q_dim"))
    return _decoder(read, "step3", attention, context, moe)


def _llama(read: HfConfig) -> ModelSpec:
    _refuse_unsupported(read)
    read.refuse("mlp_bias", False, because="FFN projections with biases are not implemented")
    read.refuse("rope_interleaved", False, because="rotary pairs are (i, i + dim/2) here")
    if read.flag("use_sliding_window", True):
        read.refuse("sliding_window", because="only full attention is implemented")
    return _decoder(read, "llama", _gqa(read, qk_norm=False), read.integer("max_position_embeddings"), None)


def _qwen3_moe(read: HfConfig) -> ModelSpec:
    _refuse_unsupported(read)
    read.refuse("use_sliding_window", False, because="only full attention is implemented")
    layers = read.integer("num_hidden_layers")
    dense = _layer_indices(read, "mlp_only_layers", layers, default=())
    step = read.integer("decoder_sparse_step", 1)
    moe = None
    if experts := read.integer("num_local_experts" if read.has("num_local_experts") else "num_experts", minimum=0):
        moe = _moe(
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
    return _decoder(read, "qwen3_moe", _gqa(read, qk_norm=True), read.integer("max_position_embeddings"), moe)


_READERS: dict[str, Callable[[HfConfig], ModelSpec]] = {
    "step3_text": _step3,
    "step3_vl": _step3_vl,
    "llama": _llama,
    "qwen3_moe": _qwen3_moe,
}


def _decoder(read: HfConfig, family: str, attention: AttentionSpec, context: int, moe: MoeSpec | None) -> ModelSpec:
    layers = read.integer("num_hidden_layers")
    all_moe = moe is not None and len(moe.layers) == layers
    return ModelSpec(
        family=family,
        layers=layers,
        hidden=read.integer("hidden_size"),
        vocab=read.integer("vocab_size"),
        max_context=context,
        norm_eps=read.number("rms_norm_eps", None if family == "step3" else 1e-6),
        tied_head=read.flag("tie_word_embeddings", False),
        attention=attention,
        rope=read_rope(read, attention.head_dim, context, default_theta=None if family == "step3" else 10_000.0),
        dense_intermediate=read.integer("intermediate_size", 0 if all_moe else None, minimum=0 if all_moe else 1),
        moe=moe,
        eos_token_ids=read.integers("eos_token_id"),
    )


def _gqa(read: HfConfig, *, qk_norm: bool) -> AttentionSpec:
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


def _moe(read: HfConfig, moe: MoeSpec) -> MoeSpec | None:
    if moe.top_k > moe.experts:
        raise UnsupportedModel(f"{read.where} sends each token to {moe.top_k} of only {moe.experts} experts")
    return moe if moe.layers else None


def _layer_indices(read: HfConfig, key: str, layers: int, default: tuple[int, ...]) -> tuple[int, ...]:
    found = tuple(sorted(set(read.integers(key, default))))
    if found and found[-1] >= layers:
        raise UnsupportedModel(f"{read.where} has layer {found[-1]} in {key}, but only {layers} layers")
    return found


def _even(read: HfConfig, head_dim: int) -> int:
    if head_dim % 2:
        raise UnsupportedModel(f"{read.where} has head_dim {head_dim}, which rotary embedding cannot split into pairs")
    return head_dim


def _refuse_unsupported(read: HfConfig) -> None:
    read.refuse("hidden_act", "silu", "swish", because="experts and dense layers here are SwiGLU with SiLU")
    read.refuse("attention_bias", False, because="attention projections with biases are not implemented")
    read.refuse("quantization_config", because="only fp32, fp16 and bf16 checkpoints are read")
    read.refuse("partial_rotary_factor", 1, because="rotary embedding here covers the whole head")
