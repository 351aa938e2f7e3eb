"""What one layer's attention is, in sizes, and what it costs. No tensors.

`AttentionSpec` is full attention: of every token that came before. A hybrid model has some layers with less, told by a
`HybridSpec` beside it. FLOPs count 2 per multiply-add, of one decoded token in one layer (Step-3 report, arXiv
2507.19427, section 4.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Of lightning attention, per number of its state: decay, outer product, and reading it out (MiniMax-M1 in table 2).
_STATE_FLOPS = 10


@dataclass(frozen=True)
class AttentionSpec:
    """kind "gqa": q, k and v projections. "mfa": q through rank `q_rank`, one KV head (report section 4). "mla": q
    through `q_rank`, keys and values as one row of `kv_rank` numbers and a rotary part of `rope_dim`; head_dim is then
    a head's key without its rotary part, and v_dim its value."""

    kind: Literal["gqa", "mfa", "mla"]
    heads: int
    kv_heads: int
    head_dim: int
    q_rank: int = 0
    qk_norm: bool = False
    kv_rank: int = 0
    rope_dim: int = 0
    v_dim: int = 0

    @property
    def kv_numbers(self) -> int:
        """Numbers in the cache for one token of context."""
        return self.kv_rank + self.rope_dim if self.kind == "mla" else 2 * self.kv_heads * self.head_dim

    @property
    def flops_per_key(self) -> int:
        """Scores and weighted values of all heads, for one token of context. MLA computes in its compressed space."""
        return 4 * self.heads * (self.kv_numbers if self.kind == "mla" else self.head_dim)

    def output_parameters(self, hidden: int) -> int:
        """The projection after attention."""
        return self.heads * (self.v_dim or self.head_dim) * hidden

    def projection_parameters(self, hidden: int) -> int:
        """Every projection before and after attention. MLA's up-projections of keys and values are absorbed: applied to
        each head's query and output."""
        if self.kind == "mla":
            q = self.heads * (self.head_dim + self.rope_dim)
            into_q = hidden * self.q_rank + self.q_rank * q if self.q_rank else hidden * q
            absorbed = self.heads * self.kv_rank * (self.head_dim + self.v_dim)
            return into_q + hidden * self.kv_numbers + absorbed + self.output_parameters(hidden)
        q = self.heads * self.head_dim
        into_q = hidden * self.q_rank + self.q_rank * q if self.kind == "mfa" else hidden * q
        return into_q + hidden * self.kv_numbers + self.output_parameters(hidden)

    @property
    def norm_parameters(self) -> int:
        """Norms inside the attention, where there are any."""
        if self.kind == "mla":
            return self.q_rank + self.kv_rank
        return (2 * self.head_dim if self.qk_norm else 0) + (self.q_rank if self.kind == "mfa" else 0)


@dataclass(frozen=True)
class HybridSpec:
    """The layers of a hybrid model that do not see everything. "chunked": projections as in the others, but at most the
    last `chunk` tokens. "linear" (lightning attention): a state of heads x head_dim x head_dim in fp32 in place of a
    cache, which each token reads and writes; as many key and value heads as heads, and a gate."""

    kind: Literal["chunked", "linear"]
    layers: tuple[int, ...]
    chunk: int = 0

    def seen(self, context: float) -> float:
        """Tokens of context that a token attends to."""
        return min(context, self.chunk) if self.kind == "chunked" else 0

    def state_numbers(self, attention: AttentionSpec) -> int:
        """Of one sequence."""
        return attention.heads * attention.head_dim**2 if self.kind == "linear" else 0

    def state_flops(self, attention: AttentionSpec) -> int:
        return _STATE_FLOPS * self.state_numbers(attention)

    def projection_parameters(self, attention: AttentionSpec, hidden: int) -> int:
        """q, k, v, gate and output of a linear layer; a chunked one's are a full one's."""
        if self.kind == "chunked":
            return attention.projection_parameters(hidden)
        return 5 * hidden * attention.heads * attention.head_dim
