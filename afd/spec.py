"""What a model is, in sizes: read from a Hugging Face config.json, and what each half of it costs.

Knows shapes and counts, no tensors. `ModelSpec` is the one description that serving, loading and planning share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from afd.types import DType


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding over `dim` numbers of each head, pairs (i, i + dim/2), base `theta`.

    kind "default"; "linear" (factor); "llama3" (factor, low_freq_factor, high_freq_factor, original_max_position);
    "yarn" (factor, beta_fast, beta_slow, original_max_position, attention_factor, mscale...); "longrope"
    (short_factors, long_factors, original_max_position, attention_factor). Semantics are transformers'.
    """

    dim: int
    theta: float
    kind: Literal["default", "linear", "llama3", "yarn", "longrope"] = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


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

    def kv_bytes_per_token(self, dtype: DType) -> int:
        """Bytes of KV cache that one token of context takes, over all layers."""
        return self.layers * 2 * self.attention.kv_heads * self.attention.head_dim * dtype.itemsize
