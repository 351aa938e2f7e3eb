"""Both halves of a decoder layer as one compiled call each: nothing of a layer is left to the interpreter.

A family gives its layer's weights as AttentionParts; what it computes with them in plain torch is the twin that the
tests compare with. Results differ from the twin's by rounding alone: sums are kept in float32 and rounded once where
torch rounds after every operation.
"""

from __future__ import annotations

import ctypes
import logging
from ctypes import byref, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from afd.errors import ModelError
from afd.layers.attention.base import PagedKv
from afd.native.attention import GROUP
from afd.native.library import CAttentionLayer, CFfnLayer, CLinear, load
from afd.native.packed import DTYPES, PackedLinear
from afd.spec import AttentionSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Projections:
    """The weights of one layer's self-attention: norms [width], matrices [out, in].

    With `wq` (MFA), qkv gives q's low rank, which inter_norm norms and wq raises; without, it gives q itself.
    """

    qkv: Tensor
    out: Tensor
    rope_table: Tensor  # [max_context, 2 · head_dim]: cosines, then signed sines
    inter_norm: Tensor | None = None
    wq: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass(frozen=True)
class AttentionParts:
    """What one layer's attention half is made of: all of one dtype but the gate, [experts, hidden] float32."""

    sizes: AttentionSpec
    eps: float
    input_norm: Tensor
    post_norm: Tensor
    projections: Projections
    gate: Tensor | None = None  # None on dense layers
    top_k: int = 0
    renormalise: bool = False


class NativeAttentionLayer:
    """One layer's attention half."""

    def __init__(self, library: ctypes.CDLL, parts: AttentionParts) -> None:
        self._call = library.afd_attention_half
        self._keep: list[object] = []
        self.top_k = parts.top_k

        def packed(weight: Tensor | None) -> CLinear:
            if weight is None:
                return CLinear()
            self._keep.append(linear := PackedLinear(library, weight))
            return linear.struct

        def vector(weight: Tensor | None) -> c_void_p:
            if weight is None:
                return c_void_p()
            self._keep.append(weight := weight.contiguous())
            return c_void_p(weight.data_ptr())

        sizes, own = parts.sizes, parts.projections
        self._wide = int(own.qkv.dtype is torch.float32)
        self._struct = CAttentionLayer(
            hidden=own.qkv.shape[1],
            heads=sizes.heads,
            kv_heads=sizes.kv_heads,
            dim=sizes.head_dim,
            input_norm=vector(parts.input_norm),
            post_norm=vector(parts.post_norm),
            qkv=packed(own.qkv),
            q_rank=0 if own.wq is None else own.wq.shape[1],
            inter_norm=vector(own.inter_norm),
            wq=packed(own.wq),
            q_norm=vector(own.q_norm),
            k_norm=vector(own.k_norm),
            rope=vector(own.rope_table),
            out=packed(own.out),
            gate=packed(parts.gate),
            experts=0 if parts.gate is None else parts.gate.shape[0],
            top_k=parts.top_k,
            renormalise=int(parts.renormalise),
            eps=parts.eps,
            scale=sizes.head_dim**-0.5,
        )

    def __call__(self, layer: int, hidden: Tensor, kv: PagedKv) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """hidden [tokens, hidden] -> residual and y of the same shape; expert ids int32 and weights float32 [tokens,
        top_k], or None on dense layers."""
        keys, values = kv.cache(layer)
        self._struct.block_size = kv.batch.block_size
        residual, y = torch.empty_like(hidden), torch.empty_like(hidden)
        ids = weights = None
        if self.top_k:
            ids = torch.empty((hidden.shape[0], self.top_k), dtype=torch.int32)
            weights = torch.empty((hidden.shape[0], self.top_k), dtype=torch.float32)
        self._call(
            self._wide, torch.get_num_threads(), byref(self._struct), byref(kv.native_step), hidden.data_ptr(),
            keys.data_ptr(), values.data_ptr(), residual.data_ptr(), y.data_ptr(),
            0 if ids is None else ids.data_ptr(), 0 if weights is None else weights.data_ptr(),
        )  # fmt: skip
        return residual, y, ids, weights


class NativeFfnLayer:
    """One layer's FFN half: `always`, (gate, up, down) of the dense FFN or shared expert, and the experts first … of
    `total`, gate and up [local, width, hidden], down [local, hidden, width]. A width of 0 adds nothing."""

    def __init__(
        self,
        library: ctypes.CDLL,
        hidden: int,
        dtype: torch.dtype,
        always: tuple[Tensor, Tensor, Tensor] | None,
        experts: tuple[Tensor, Tensor, Tensor] | None = None,
        first: int = 0,
        total: int = 0,
    ) -> None:
        self._call = library.afd_ffn_half
        self._wide = int(dtype is torch.float32)
        self._total = total
        self._keep: list[PackedLinear] = []

        def packed(gate: Tensor, up: Tensor, down: Tensor) -> tuple[CLinear, CLinear]:
            self._keep += [PackedLinear(library, torch.cat((gate, up)), pairs=True), PackedLinear(library, down)]
            return self._keep[-2].struct, self._keep[-1].struct

        up, down = packed(*always) if always is not None and always[0].shape[0] else (CLinear(), CLinear())
        each = [packed(*parts) for parts in zip(*experts, strict=True)] if experts and experts[0].shape[1] else []
        self._ups = (CLinear * len(each))(*(e[0] for e in each))
        self._downs = (CLinear * len(each))(*(e[1] for e in each))
        self._struct = CFfnLayer(c_int64(hidden), up, down, first, len(each), total, self._ups, self._downs)

    def __call__(self, y: Tensor, ids: Tensor | None, weights: Tensor | None) -> Tensor | None:
        """y [tokens, hidden], ids int32 and weights float32 [tokens, top_k] -> the partial sum [tokens, hidden], None
        when this shard adds nothing. Raises ModelError for an expert that is not there."""
        y, top_k, ids_at, weights_at = y.contiguous(), 0, 0, 0
        if ids is not None and weights is not None:
            ids, weights, top_k = ids.contiguous(), weights.contiguous(), ids.shape[1]
            ids_at, weights_at = ids.data_ptr(), weights.data_ptr()
        out = torch.empty_like(y)
        added = self._call(
            self._wide, torch.get_num_threads(), byref(self._struct), y.data_ptr(), y.shape[0], ids_at, weights_at,
            top_k, out.data_ptr(),
        )  # fmt: skip
        if added < 0:
            assert ids is not None, "no ids, no wrong ids"
            worst = int(ids.min() if ids.min() < 0 else ids.max())
            raise ModelError(f"a token was sent to expert {worst}, but the model has experts 0 to {self._total - 1}")
        return out if added else None


def kernels_for(device: torch.device, dtype: torch.dtype, hidden: int) -> ctypes.CDLL | None:
    """The compiled kernels, where they can serve a model of this size; None: plain torch does."""
    if device.type != "cpu" or dtype not in DTYPES or hidden % 2:
        return None
    return load()


def attention_fits(library: ctypes.CDLL, head_dim: int, block_size: int, q_rank: int) -> bool:
    """Whether the attention kernel takes these sizes; logs what keeps it from it."""
    lanes = library.afd_lanes()
    misfit = (
        f"head_dim {head_dim} is no multiple of {lanes}"
        if head_dim % lanes
        else f"attention.block_size {block_size} is no multiple of {GROUP}"
        if block_size % GROUP
        else f"the low rank of q, {q_rank}, is odd"
        if q_rank % 2
        else ""
    )
    if misfit:
        log.warning("plain torch instead of the compiled attention kernel: %s", misfit)
    return not misfit
