"""Rotary embedding in numbers: what RopeSpec holds, and the two ways a config.json writes it. No tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from afd.errors import UnsupportedModel
from afd.hf_config import HfConfig

RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope"]


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding over `dim` numbers of each head, pairs (i, i + dim/2), base `theta`.

    kind "default"; "linear" (factor); "llama3" (factor, low_freq_factor, high_freq_factor, original_max_position);
    "yarn" (factor, beta_fast, beta_slow, original_max_position, attention_factor, mscale...); "longrope"
    (short_factors, long_factors, original_max_position, attention_factor). Semantics are transformers', but for one
    choice: longrope takes its long factors when the model's max_context is above original_max_position, for every
    request. transformers picks by the longest sequence of each batch, which makes a token's keys depend on what else
    is in the batch and disagree with those already cached.
    """

    dim: int
    theta: float
    kind: RopeKind = "default"
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


_LENGTH = "original_max_position_embeddings"
_KEYS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", _LENGTH}),
    "yarn": frozenset(
        {"factor", "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim", _LENGTH}
    ),
    "longrope": frozenset({"factor", "short_factor", "long_factor", "attention_factor", _LENGTH}),
}
_COMMON_KEYS = frozenset({"type", "rope_type", "rope_theta", "partial_rotary_factor"})


def read_rope(read: HfConfig, head_dim: int, context: int, default_theta: float | None) -> RopeSpec:
    """The rotary settings of a model of `context` tokens: from rope_scaling (older files; kind under `type` or
    `rope_type`) or rope_parameters (transformers 5). `default_theta` None: rope_theta is required. Raises
    UnsupportedModel for an unknown kind, or a key that the kind does not take."""
    params = (
        read.child("rope_scaling") or read.child("rope_parameters") or HfConfig({}, f"{read.where} rope_parameters")
    )
    kind = params.text("rope_type" if params.has("rope_type") else "type", "default")
    if kind not in _KEYS:
        raise UnsupportedModel(f"{params.where} has rope type {kind!r}; choose one of {', '.join(_KEYS)}")
    params.refuse("partial_rotary_factor", 1, because="rotary embedding here covers the whole head")
    unknown = params.keys() - _KEYS[kind] - _COMMON_KEYS
    if unknown:
        raise UnsupportedModel(f"{params.where} has {sorted(unknown)[0]}, which rope type {kind!r} does not take")
    theta = (params if params.has("rope_theta") else read).number("rope_theta", default_theta)
    spec = RopeSpec(dim=head_dim, theta=theta)
    if kind == "default":
        return spec
    # A file-level original length wins over the one beside the factors, as in transformers.
    original = params.integer(_LENGTH, context)
    original = read.integer(_LENGTH, original)
    implied = context / original if kind in ("yarn", "longrope") else None
    if kind == "llama3" and params.number("high_freq_factor") <= params.number("low_freq_factor"):
        raise UnsupportedModel(f"{params.where} has a high_freq_factor that is not above its low_freq_factor")
    return RopeSpec(
        dim=head_dim,
        theta=theta,
        kind=cast(RopeKind, kind),
        factor=params.number("factor", implied),
        original_max_position=0 if kind == "linear" else original,
        low_freq_factor=params.number("low_freq_factor", None if kind == "llama3" else spec.low_freq_factor),
        high_freq_factor=params.number("high_freq_factor", None if kind == "llama3" else spec.high_freq_factor),
        beta_fast=params.number("beta_fast", spec.beta_fast),
        beta_slow=params.number("beta_slow", spec.beta_slow),
        truncate=params.flag("truncate", True),
        attention_factor=params.optional_number("attention_factor"),
        mscale=params.optional_number("mscale"),
        mscale_all_dim=params.optional_number("mscale_all_dim"),
        short_factors=params.numbers("short_factor", head_dim // 2) if kind == "longrope" else (),
        long_factors=params.numbers("long_factor", head_dim // 2) if kind == "longrope" else (),
    )
