"""Qwen3 MoE: grouped-query attention with q and k normed per head; each expert has checkpoint tensors of its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from afd.layers.rope import RotaryEmbedding
from afd.models import decoder
from afd.models.decoder import DecoderAttentionHalf, DecoderFfnHalf, GroupedQueryAttention, SwiGluWeights, layer_prefix
from afd.spec import ModelSpec, MoeSpec
from afd.types import Cut, Role, TensorSpec

GATE = "mlp.gate.weight"


def tensors(spec: ModelSpec) -> list[TensorSpec]:
    """Every checkpoint tensor, under its Hugging Face name."""
    found = decoder.end_tensors(spec)
    for layer in range(spec.layers):
        prefix = layer_prefix(layer)
        found += decoder.norm_tensors(spec, prefix)
        found += decoder.gqa_tensors(spec, prefix)
        if spec.moe and spec.is_moe(layer):
            found.append(decoder.attention_tensor(prefix + GATE, spec.moe.experts, spec.hidden))
            for expert in range(spec.moe.experts):
                found += _expert_tensors(spec, spec.moe, prefix, expert)
        else:
            found += decoder.swiglu_tensors(spec, f"{prefix}mlp.", spec.dense_intermediate)
    return found


class Qwen3MoeAttentionHalf(DecoderAttentionHalf):
    """Grouped-query attention with q and k norms, and the gate."""

    gate_name = GATE

    def build_attention(
        self, rope: RotaryEmbedding, weights: Mapping[str, Tensor], prefix: str
    ) -> GroupedQueryAttention:
        return GroupedQueryAttention(self.spec, rope, weights, prefix)


class Qwen3MoeFfnHalf(DecoderFfnHalf):
    """Dense layers or experts; no shared expert."""

    def expert_weights(self, weights: Mapping[str, Tensor], prefix: str, first: int, end: int) -> SwiGluWeights:
        gate, up, down = (
            torch.stack([weights[_expert_name(prefix, expert, part)] for expert in range(first, end)])
            for part in ("gate", "up", "down")
        )
        return gate, up, down


def _expert_name(prefix: str, expert: int, part: str) -> str:
    return f"{prefix}mlp.experts.{expert}.{part}_proj.weight"


def _expert_tensors(spec: ModelSpec, moe: MoeSpec, prefix: str, expert: int) -> list[TensorSpec]:
    inner, outer = (moe.intermediate, spec.hidden), (spec.hidden, moe.intermediate)
    return [
        TensorSpec(_expert_name(prefix, expert, "gate"), inner, Role.FFN, (Cut(0, "tp"),), expert),
        TensorSpec(_expert_name(prefix, expert, "up"), inner, Role.FFN, (Cut(0, "tp"),), expert),
        TensorSpec(_expert_name(prefix, expert, "down"), outer, Role.FFN, (Cut(1, "tp"),), expert),
    ]
