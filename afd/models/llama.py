"""Llama and its many relatives: grouped-query attention, dense SwiGLU layers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from afd.layers.rope import RotaryEmbedding
from afd.models import decoder
from afd.models.decoder import DecoderAttentionHalf, DecoderFfnHalf, GroupedQueryAttention, layer_prefix
from afd.spec import ModelSpec
from afd.types import TensorSpec


def tensors(spec: ModelSpec) -> list[TensorSpec]:
    """Every checkpoint tensor, under its Hugging Face name."""
    found = decoder.end_tensors(spec)
    for prefix in map(layer_prefix, range(spec.layers)):
        found += decoder.norm_tensors(spec, prefix)
        found += decoder.gqa_tensors(spec, prefix)
        found += decoder.swiglu_tensors(spec, f"{prefix}mlp.", spec.dense_intermediate)
    return found


class LlamaAttentionHalf(DecoderAttentionHalf):
    """Nothing but the shared layer with grouped-query attention."""

    def build_attention(
        self, rope: RotaryEmbedding, weights: Mapping[str, Tensor], prefix: str
    ) -> GroupedQueryAttention:
        return GroupedQueryAttention(self.spec, rope, weights, prefix)


class LlamaFfnHalf(DecoderFfnHalf):
    """Nothing but the shared dense layer."""
