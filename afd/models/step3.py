"""Step-3: multi-matrix factorisation attention (MFA) and MoE layers with a shared expert.

Source: Step-3 report (arXiv 2507.19427), section 4, and the published checkpoint's names and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from afd.layers.linear import Linear
from afd.layers.norm import RmsNorm
from afd.layers.rope import RotaryEmbedding
from afd.models import decoder
from afd.models.decoder import DecoderAttentionHalf, DecoderFfnHalf, SwiGluWeights, layer_prefix
from afd.models.halves import KvView
from afd.native.halves import Projections
from afd.spec import ModelSpec, MoeSpec
from afd.types import Cut, Role, TensorSpec

GATE = "moe.gate.weight"
SHARED = "share_expert."


def tensors(spec: ModelSpec) -> list[TensorSpec]:
    """Every checkpoint tensor, under its Hugging Face name."""
    found = decoder.end_tensors(spec)
    for layer in range(spec.layers):
        prefix = layer_prefix(layer)
        found += decoder.norm_tensors(spec, prefix)
        found += _mfa_tensors(spec, prefix)
        if spec.moe and spec.is_moe(layer):
            found += _moe_tensors(spec, spec.moe, prefix)
        else:
            found += decoder.swiglu_tensors(spec, f"{prefix}mlp.", spec.dense_intermediate)
    return found


class MultiMatrixFactorisationAttention:
    """Many query heads, projected down to a common rank, normed, and up again; one key head and one value head."""

    def __init__(self, spec: ModelSpec, rope: RotaryEmbedding, weights: Mapping[str, Tensor], prefix: str) -> None:
        self._spec = spec.attention
        self._rope = rope
        name = f"{prefix}self_attn."
        self._down = Linear.packed(*(weights[f"{name}{x}_proj.weight"] for x in "qkv"))  # q to its rank; k; v
        self._inter_norm = RmsNorm(weights[f"{name}inter_norm.weight"], spec.norm_eps)
        self._wq = Linear(weights[f"{name}wq.weight"])
        self._o = Linear(weights[f"{name}o_proj.weight"])

    def __call__(self, layer: int, x: Tensor, positions: Tensor, kv: KvView) -> Tensor:
        tokens, heads, dim = x.shape[0], self._spec.heads, self._spec.head_dim
        low_q, k, v = torch.split(self._down(x), [self._spec.q_rank, dim, dim], dim=-1)
        q = self._wq(self._inter_norm(low_q)).view(tokens, heads, dim)
        q, k = self._rope(q, positions), self._rope(k.view(tokens, 1, dim), positions)
        out = kv.attend(layer, q, k, v.view(tokens, 1, dim), dim**-0.5)
        return self._o(out.reshape(tokens, heads * dim))

    def projections(self) -> Projections:
        return Projections(
            self._down.weight, self._o.weight, self._rope.table, self._inter_norm.weight, self._wq.weight
        )


class Step3AttentionHalf(DecoderAttentionHalf):
    """MFA and the gate."""

    gate_name = GATE

    def build_attention(
        self, rope: RotaryEmbedding, weights: Mapping[str, Tensor], prefix: str
    ) -> MultiMatrixFactorisationAttention:
        return MultiMatrixFactorisationAttention(self.spec, rope, weights, prefix)


class Step3FfnHalf(DecoderFfnHalf):
    """Dense layers, or experts beside a shared expert."""

    shared_name = SHARED

    def expert_weights(self, weights: Mapping[str, Tensor], prefix: str, first: int, end: int) -> SwiGluWeights:
        gate, up, down = (weights[f"{prefix}moe.{part}_proj.weight"] for part in ("gate", "up", "down"))
        assert gate.shape[0] == end - first, f"{prefix}moe holds {gate.shape[0]} experts, not {end - first}"
        return gate, up, down


def _mfa_tensors(spec: ModelSpec, prefix: str) -> list[TensorSpec]:
    attention, name = spec.attention, f"{prefix}self_attn."
    q, dim, rank = attention.heads * attention.head_dim, attention.head_dim, attention.q_rank
    return [
        decoder.attention_tensor(f"{name}q_proj.weight", rank, spec.hidden),
        decoder.attention_tensor(f"{name}inter_norm.weight", rank),
        decoder.attention_tensor(f"{name}wq.weight", q, rank),
        decoder.attention_tensor(f"{name}k_proj.weight", dim, spec.hidden),
        decoder.attention_tensor(f"{name}v_proj.weight", dim, spec.hidden),
        decoder.attention_tensor(f"{name}o_proj.weight", spec.hidden, q),
    ]


def _moe_tensors(spec: ModelSpec, moe: MoeSpec, prefix: str) -> list[TensorSpec]:
    inner = (moe.experts, moe.intermediate, spec.hidden)
    outer = (moe.experts, spec.hidden, moe.intermediate)
    found = [
        decoder.attention_tensor(prefix + GATE, moe.experts, spec.hidden),
        TensorSpec(f"{prefix}moe.gate_proj.weight", inner, Role.FFN, (Cut(0, "ep"), Cut(1, "tp"))),
        TensorSpec(f"{prefix}moe.up_proj.weight", inner, Role.FFN, (Cut(0, "ep"), Cut(1, "tp"))),
        TensorSpec(f"{prefix}moe.down_proj.weight", outer, Role.FFN, (Cut(0, "ep"), Cut(2, "tp"))),
    ]
    if moe.shared_intermediate:
        found += decoder.swiglu_tensors(spec, prefix + SHARED, moe.shared_intermediate)
    return found
