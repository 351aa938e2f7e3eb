"""What a model is, in sizes, and what each half of it costs: the one description that serving, loading and planning
share. Shapes and counts, no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from afd.attention_spec import AttentionSpec, HybridSpec
from afd.rope_spec import RopeSpec
from afd.types import DType, Role


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
    hybrid: HybridSpec | None = None  # None: every layer's attention is full

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
        """Bytes of KV cache that one token of context takes, over all layers that keep one."""
        return self._caching_layers * self.attention.kv_numbers * dtype.itemsize

    def kv_bytes(self, context: float, dtype: DType, window_dtype: DType | None = None) -> float:
        """Bytes that one decoded token reads of what is kept of `context` tokens, and of a linear layer's state, which
        it writes too. `window_dtype`: of chunked layers, where it is another."""
        return sum(self.layer_kv_bytes(layer, context, dtype, window_dtype) for layer in range(self.layers))

    def held_bytes(self, context: float, dtype: DType, window_dtype: DType | None = None) -> float:
        """Memory that a sequence of `context` tokens takes on its attention worker."""
        state = self.hybrid.state_numbers(self.attention) * len(self.hybrid.layers) if self.hybrid else 0
        return self.kv_bytes(context, dtype, window_dtype) - state * DType.FP32.itemsize  # reads and writes it: twice

    # FLOPs of one decoded token over all layers, 2 per multiply-add (Step-3 report, section 4.1, which leaves out
    # norms, rotary embedding, gate and softmax: together well under 1 %).

    def attention_flops_per_token(self, context: int) -> int:
        """Scores and weighted values of one token that sees `context` tokens; no projections."""
        return round(sum(self.layer_attention_flops(layer, context) for layer in range(self.layers)))

    @property
    def linear_flops_per_token(self) -> int:
        """The projections before and after attention."""
        return 2 * sum(map(self.layer_projection_parameters, range(self.layers)))

    @property
    def ffn_flops_per_token(self) -> int:
        """Dense layers, the top_k experts and the shared expert: the whole FFN half."""
        return sum(map(self.layer_ffn_flops, range(self.layers)))

    # The same, of one layer: hybrid models' layers differ.

    def layer_kv_bytes(self, layer: int, context: float, dtype: DType, window_dtype: DType | None = None) -> float:
        less = self._less(layer)
        if less is None:
            return self.attention.kv_numbers * context * dtype.itemsize
        state = 2 * less.state_numbers(self.attention) * DType.FP32.itemsize
        return self.attention.kv_numbers * less.seen(context) * (window_dtype or dtype).itemsize + state

    def layer_attention_flops(self, layer: int, context: float) -> float:
        less = self._less(layer)
        if less is None:
            return self.attention.flops_per_key * context
        return self.attention.flops_per_key * less.seen(context) + less.state_flops(self.attention)

    def layer_projection_parameters(self, layer: int) -> int:
        less = self._less(layer)
        if less is None:
            return self.attention.projection_parameters(self.hidden)
        return less.projection_parameters(self.attention, self.hidden)

    def layer_ffn_flops(self, layer: int) -> int:
        return 2 * 3 * self.hidden * self._active_width(layer)

    def layer_ffn_parameters(self, layer: int, tokens: float | None = None) -> float:
        """The FFN half's weights; with `tokens`, those that so many tokens need: of the routed experts, those that the
        gate picks for any of them, each expert being as likely as the others."""
        if self.moe is None or not self.is_moe(layer):
            return 3 * self.hidden * self.dense_intermediate
        untouched = 0.0 if tokens is None else (1 - self.moe.top_k / self.moe.experts) ** tokens
        routed = self.moe.experts * self.moe.intermediate * (1 - untouched)
        return 3 * self.hidden * (routed + self.moe.shared_intermediate)

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
        if role is Role.FFN:
            return round(sum(map(self.layer_ffn_parameters, range(self.layers))))
        projections = sum(map(self.layer_projection_parameters, range(self.layers)))
        norms = self.layers * (2 * self.hidden + self.attention.norm_parameters)
        gates = len(self.moe_layers) * self.num_experts * self.hidden
        ends = self.vocab * self.hidden * (1 if self.tied_head else 2) + self.hidden
        return projections + norms + gates + ends

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

    def _less(self, layer: int) -> HybridSpec | None:
        """What `layer` has in place of full attention."""
        return self.hybrid if self.hybrid is not None and layer in self.hybrid.layers else None

    @property
    def _caching_layers(self) -> int:
        return self.layers - (len(self.hybrid.layers) if self.hybrid and self.hybrid.kind == "linear" else 0)

    def _active_width(self, layer: int) -> int:
        """Intermediate numbers that one token goes through in the FFN half."""
        if self.moe is None or not self.is_moe(layer):
            return self.dense_intermediate
        return self.moe.top_k * self.moe.intermediate + self.moe.shared_intermediate
