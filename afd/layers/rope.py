"""Rotary position embedding: frequencies of every kind of RopeSpec, and their application.

Frequencies follow transformers' modeling_rope_utils (linear; llama3; YaRN, arXiv 2309.00071; LongRoPE,
arXiv 2402.13753), so that a checkpoint gives the same logits; RopeSpec says where longrope departs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from afd.spec import RopeSpec


class RotaryEmbedding:
    """Rotates pairs (i, i + dim/2) of each head by position · frequency i.

    Keeps one table [max_context, 2·dim]: cosines, then sines signed for the swap of halves. 65536 positions of 256
    numbers take 64 MiB in bf16.
    """

    def __init__(self, spec: RopeSpec, max_context: int, dtype: torch.dtype, device: torch.device) -> None:
        frequencies, scaling = inverse_frequencies(spec, max_context)
        angles = torch.arange(max_context, dtype=torch.float32)[:, None] * frequencies  # [max_context, dim/2]
        cos, sin = angles.cos() * scaling, angles.sin() * scaling
        self.table = torch.cat((cos, cos, -sin, sin), dim=-1).to(device, dtype)

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [tokens, heads, dim], positions [tokens] int64 below max_context -> rotated x, contiguous."""
        cos, sin = self.table.index_select(0, positions)[:, None, :].chunk(2, dim=-1)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((second, first), dim=-1).mul_(sin).addcmul_(x, cos)


def inverse_frequencies(spec: RopeSpec, max_context: int) -> tuple[Tensor, float]:
    """Radians per position of each pair, [dim/2] float32, and the factor on cosines and sines."""
    exponents = torch.arange(0, spec.dim, 2, dtype=torch.int64).float() / spec.dim
    plain = 1.0 / (spec.theta**exponents)
    if spec.kind == "default":
        return plain, 1.0
    if spec.kind == "linear":
        return plain / spec.factor, 1.0
    if spec.kind == "llama3":
        return _llama3(spec, plain), 1.0
    if spec.kind == "yarn":
        return _yarn(spec, plain), _yarn_scaling(spec)
    factors = spec.long_factors if max_context > spec.original_max_position else spec.short_factors
    return 1.0 / (torch.tensor(factors) * spec.theta**exponents), _longrope_scaling(spec)


def _llama3(spec: RopeSpec, plain: Tensor) -> Tensor:
    """Long waves are slowed down by `factor`, short ones kept, those between blended."""
    turns = spec.original_max_position * plain / (2 * math.pi)  # full turns within the original length
    blend = ((turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)).clamp(0, 1)
    return (1 - blend) * plain / spec.factor + blend * plain


def _yarn(spec: RopeSpec, plain: Tensor) -> Tensor:
    """Pairs that turn less than beta_slow times within the original length are interpolated, more than beta_fast
    kept, those between blended by their index."""

    def pair_turning(turns: float) -> float:
        return spec.dim * math.log(spec.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = pair_turning(spec.beta_fast), pair_turning(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dim - 1)
    width = high - low if high != low else 0.001  # one pair wide: a step, not a division by zero
    interpolated = ((torch.arange(spec.dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return plain / spec.factor * interpolated + plain * (1 - interpolated)


def _yarn_scaling(spec: RopeSpec) -> float:
    if spec.attention_factor is not None:
        return spec.attention_factor

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(spec.factor) + 1.0 if spec.factor > 1 else 1.0

    if spec.mscale and spec.mscale_all_dim:
        return mscale(spec.mscale) / mscale(spec.mscale_all_dim)
    return mscale(1.0)


def _longrope_scaling(spec: RopeSpec) -> float:
    if spec.attention_factor is not None:
        return spec.attention_factor
    if spec.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(spec.factor) / math.log(spec.original_max_position))
