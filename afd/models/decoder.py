"""What every family here shares: a pre-norm decoder layer, cut between its attention half and its FFN half.

A family file adds its own projections, names its gate and its experts, and lists its tensors. Weights are looked up
once each, in layer order, and packed as they come: `weights` may be a mapping that reads from files.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Mapping
from ctypes import CDLL
from dataclasses import dataclass
from typing import ClassVar, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from afd.layers.attention.base import PagedKv
from afd.layers.experts import Experts
from afd.layers.gate import Gate
from afd.layers.linear import Linear, SwiGlu
from afd.layers.norm import RmsNorm
from afd.layers.rope import RotaryEmbedding
from afd.models.halves import AttentionHalf, AttentionOutput, FfnHalf, KvView, Routing
from afd.native.halves import AttentionParts, NativeAttentionLayer, NativeFfnLayer, Projections
from afd.native.packed import PackedLinear
from afd.spec import ModelSpec
from afd.topology import FfnShard
from afd.types import Cut, Role, TensorSpec

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

# Logits computed between two looks for something more urgent: a few tenths of a millisecond at hidden size 576. A
# whole head takes ten times as long as a layer, and the FFN side would have nothing to do meanwhile.
HEAD_SLICE = 1 << 16


def layer_prefix(layer: int) -> str:
    return f"model.layers.{layer}."


class SelfAttention(Protocol):
    """One layer's projections, rotary embedding and output; the cache and the kernel are behind `kv`."""

    def __call__(self, layer: int, x: Tensor, positions: Tensor, kv: KvView) -> Tensor:
        """x [tokens, hidden], normalised -> [tokens, hidden], to be added to the residual"""
        ...

    def projections(self) -> Projections:
        """The same weights, for the compiled kernels."""
        ...


class GroupedQueryAttention:
    """q, k and v projections in one product; with qk_norm, q and k are normed per head before they are rotated."""

    def __init__(self, spec: ModelSpec, rope: RotaryEmbedding, weights: Mapping[str, Tensor], prefix: str) -> None:
        self._spec = spec.attention
        self._rope = rope
        self._qkv = Linear.packed(*(weights[f"{prefix}self_attn.{x}_proj.weight"] for x in "qkv"))
        self._o = Linear(weights[f"{prefix}self_attn.o_proj.weight"])
        self._norms: tuple[RmsNorm, RmsNorm] | None = None
        if spec.attention.qk_norm:
            q_norm, k_norm = (weights[f"{prefix}self_attn.{x}_norm.weight"] for x in "qk")
            self._norms = RmsNorm(q_norm, spec.norm_eps), RmsNorm(k_norm, spec.norm_eps)

    def __call__(self, layer: int, x: Tensor, positions: Tensor, kv: KvView) -> Tensor:
        heads, kv_heads, dim = self._spec.heads, self._spec.kv_heads, self._spec.head_dim
        qkv = self._qkv(x).view(x.shape[0], heads + 2 * kv_heads, dim)  # [tokens, heads, head_dim]
        q_and_k, v = torch.split(qkv, [heads + kv_heads, kv_heads], dim=1)
        if self._norms:
            q, k = torch.split(q_and_k, [heads, kv_heads], dim=1)
            q_and_k = torch.cat((self._norms[0](q), self._norms[1](k)), dim=1)
        q, k = torch.split(self._rope(q_and_k, positions), [heads, kv_heads], dim=1)
        out = kv.attend(layer, q, k, v, dim**-0.5)
        return self._o(out.reshape(x.shape[0], heads * dim))

    def projections(self) -> Projections:
        q_norm, k_norm = (norm.weight for norm in self._norms) if self._norms else (None, None)
        return Projections(self._qkv.weight, self._o.weight, self._rope.table, q_norm=q_norm, k_norm=k_norm)


@dataclass(frozen=True)
class _AttentionLayer:
    input_norm: RmsNorm
    attention: SelfAttention
    post_norm: RmsNorm
    gate: Gate | None  # None on dense layers


class DecoderAttentionHalf(AttentionHalf):
    """The attention half of every family here."""

    gate_name: ClassVar[str] = ""  # after the layer's prefix

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Tensor], kernels: CDLL | None = None) -> None:
        super().__init__(spec, weights, kernels)
        self._kernels = kernels
        self._embedding = weights[EMBEDDING]  # [vocab, hidden]
        device, dtype = self._embedding.device, self._embedding.dtype
        self._rope = RotaryEmbedding(spec.rope, spec.max_context, dtype, device)
        self._layers = [self._build_layer(weights, layer) for layer in range(spec.layers)]
        self._final_norm = RmsNorm(weights[FINAL_NORM], spec.norm_eps)
        head = self._embedding if spec.tied_head else weights[HEAD]
        self._head = PackedLinear(kernels, head) if kernels else Linear(head)

    @abstractmethod
    def build_attention(self, rope: RotaryEmbedding, weights: Mapping[str, Tensor], prefix: str) -> SelfAttention:
        """The projections of the layer whose tensor names begin with `prefix`."""

    def embed(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self._embedding)

    def layer(self, layer: int, hidden: Tensor, positions: Tensor, kv: KvView) -> AttentionOutput:
        parts = self._layers[layer]
        if isinstance(parts, NativeAttentionLayer):
            residual, y, ids, gate_weights = parts(layer, hidden, paged(kv))
            return AttentionOutput(
                residual, y, Routing(ids, gate_weights) if ids is not None and gate_weights is not None else None
            )
        residual = hidden + parts.attention(layer, parts.input_norm(hidden), positions, kv)
        y = parts.post_norm(residual)
        return AttentionOutput(residual, y, Routing(*parts.gate(y)) if parts.gate else None)

    def head(self, hidden: Tensor) -> Generator[None, None, Tensor]:
        x = self._final_norm(hidden)
        if isinstance(self._head, PackedLinear):
            return (yield from self._head.in_slices(x, HEAD_SLICE))
        return self._head(x).float()

    def _build_layer(self, weights: Mapping[str, Tensor], layer: int) -> _AttentionLayer | NativeAttentionLayer:
        spec, prefix = self.spec, layer_prefix(layer)
        gate = None
        if spec.moe and spec.is_moe(layer):
            gate = Gate(weights[prefix + self.gate_name], spec.top_k, renormalise=spec.moe.renormalise)
        input_norm = RmsNorm(weights[f"{prefix}input_layernorm.weight"], spec.norm_eps)
        attention = self.build_attention(self._rope, weights, prefix)
        post_norm = RmsNorm(weights[f"{prefix}post_attention_layernorm.weight"], spec.norm_eps)
        if self._kernels is None:
            return _AttentionLayer(input_norm, attention, post_norm, gate)
        parts = AttentionParts(
            sizes=spec.attention,
            eps=spec.norm_eps,
            input_norm=input_norm.weight,
            post_norm=post_norm.weight,
            projections=attention.projections(),
            gate=gate.weight if gate else None,
            top_k=spec.top_k if gate else 0,
            renormalise=bool(spec.moe and spec.moe.renormalise),
        )
        return NativeAttentionLayer(self._kernels, parts)


@dataclass(frozen=True)
class _FfnLayer:
    always: SwiGlu | None  # the dense FFN or the shared expert: every token; None where this shard's slice is empty
    experts: Experts | None  # None on dense layers


class DecoderFfnHalf(FfnHalf):
    """The FFN half of every family here."""

    shared_name: ClassVar[str] = ""  # the shared expert, after the layer's prefix; used where the spec has one

    def __init__(
        self, spec: ModelSpec, weights: Mapping[str, Tensor], shard: FfnShard, kernels: CDLL | None = None
    ) -> None:
        super().__init__(spec, weights, shard, kernels)
        self._kernels = kernels
        self._layers = [self._build_layer(weights, layer) for layer in range(spec.layers)]

    def expert_weights(self, weights: Mapping[str, Tensor], prefix: str, first: int, end: int) -> SwiGluWeights:
        """Experts first … end - 1 of the layer whose tensor names begin with `prefix`, stacked: gate and up [experts,
        width, hidden], down [experts, hidden, width]; families with MoE say how."""
        raise NotImplementedError

    def layer(self, layer: int, y: Tensor, routing: Routing | None) -> Tensor | None:
        parts = self._layers[layer]
        assert (routing is None) != self.spec.is_moe(layer), f"layer {layer} and its routing disagree on experts"
        if isinstance(parts, NativeFfnLayer):
            return parts(y, *((routing.expert_ids, routing.weights) if routing else (None, None)))
        delta = parts.always(y) if parts.always else None
        if parts.experts and routing:
            chosen = parts.experts(y, routing.expert_ids, routing.weights)
            if chosen is not None:
                delta = (chosen if delta is None else chosen.add_(delta)).to(y.dtype)
        return delta

    def _build_layer(self, weights: Mapping[str, Tensor], layer: int) -> _FfnLayer | NativeFfnLayer:
        spec, moe, prefix = self.spec, self.spec.moe, layer_prefix(layer)
        always, experts, first, total = None, None, 0, 0
        if moe is None or not spec.is_moe(layer):
            always = _swiglu_weights(weights, prefix + "mlp.")
        else:
            if moe.shared_intermediate:
                always = _swiglu_weights(weights, prefix + self.shared_name)
            first, end = self.shard.bounds(moe.experts, "ep")
            experts, total = self.expert_weights(weights, prefix, first, end), moe.experts
        if self._kernels:
            dtype = (always or experts)[0].dtype  # type: ignore[index]  # a layer has at least one of them
            return NativeFfnLayer(self._kernels, spec.hidden, dtype, always, experts, first, total)
        return _FfnLayer(
            SwiGlu(*always) if always and always[0].shape[0] else None,
            Experts(*experts, first=first, total=total) if experts else None,
        )


SwiGluWeights = tuple[Tensor, Tensor, Tensor]  # gate, up, down


def _swiglu_weights(weights: Mapping[str, Tensor], name: str) -> SwiGluWeights:
    gate, up, down = (weights[f"{name}{part}_proj.weight"] for part in ("gate", "up", "down"))
    return gate, up, down


def paged(kv: KvView) -> PagedKv:
    """The paged cache behind a KvView, which compiled layers read and write themselves."""
    assert hasattr(kv, "native_step"), f"compiled layers attend through a paged cache, not through {type(kv).__name__}"
    return cast(PagedKv, kv)


def attention_tensor(name: str, *shape: int, optional: bool = False) -> TensorSpec:
    return TensorSpec(name, shape, Role.ATTENTION, optional=optional)


def end_tensors(spec: ModelSpec) -> list[TensorSpec]:
    """Embedding, final norm and LM head; a tied head may be missing from the checkpoint."""
    return [
        attention_tensor(EMBEDDING, spec.vocab, spec.hidden),
        attention_tensor(FINAL_NORM, spec.hidden),
        attention_tensor(HEAD, spec.vocab, spec.hidden, optional=spec.tied_head),
    ]


def norm_tensors(spec: ModelSpec, prefix: str) -> list[TensorSpec]:
    """The two norms around a layer's attention."""
    names = ("input_layernorm.weight", "post_attention_layernorm.weight")
    return [attention_tensor(prefix + name, spec.hidden) for name in names]


def gqa_tensors(spec: ModelSpec, prefix: str) -> list[TensorSpec]:
    """A layer's GroupedQueryAttention."""
    attention, name = spec.attention, f"{prefix}self_attn."
    q, kv = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    tensors = [
        attention_tensor(f"{name}q_proj.weight", q, spec.hidden),
        attention_tensor(f"{name}k_proj.weight", kv, spec.hidden),
        attention_tensor(f"{name}v_proj.weight", kv, spec.hidden),
        attention_tensor(f"{name}o_proj.weight", spec.hidden, q),
    ]
    if attention.qk_norm:
        tensors += [attention_tensor(f"{name}{x}_norm.weight", attention.head_dim) for x in "qk"]
    return tensors


def swiglu_tensors(spec: ModelSpec, name: str, width: int) -> list[TensorSpec]:
    """A dense FFN or shared expert, sliced over all FFN ranks."""
    return [
        TensorSpec(f"{name}gate_proj.weight", (width, spec.hidden), Role.FFN, (Cut(0, "rank"),)),
        TensorSpec(f"{name}up_proj.weight", (width, spec.hidden), Role.FFN, (Cut(0, "rank"),)),
        TensorSpec(f"{name}down_proj.weight", (spec.hidden, width), Role.FFN, (Cut(1, "rank"),)),
    ]
