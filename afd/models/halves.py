"""The contract of a split model: an attention half and an FFN half that share nothing but activations.

A family file implements both, and lists the checkpoint tensors each needs. Halves are built from tensors that
somebody else loaded (afd.weights) and attend through a KvView that somebody else keeps (the attention worker's paged
cache, or the reference's plain one), so a model knows neither files nor pages nor wires.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from ctypes import CDLL
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from afd.spec import ModelSpec
from afd.topology import FfnShard


@dataclass(frozen=True, slots=True)
class Routing:
    """Which experts each token goes to, decided by the gate on the attention side."""

    expert_ids: Tensor  # [tokens, top_k] int32
    weights: Tensor  # [tokens, top_k] float32


@dataclass(frozen=True, slots=True)
class AttentionOutput:
    """What one attention half gives: the residual (stays) and the normalised tensor (leaves for the FFN half)."""

    residual: Tensor  # [tokens, hidden]
    y: Tensor  # [tokens, hidden]
    routing: Routing | None  # None on dense layers


class KvView(Protocol):
    """The KV cache as one microbatch of tokens sees it during one step."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Stores k and v [tokens, kv_heads, head_dim] of this step's tokens, then lets each token of q
        [tokens, heads, head_dim] attend causally to its own sequence. Returns [tokens, heads, head_dim]."""
        ...


class AttentionHalf(ABC):
    """Embedding, every layer's attention, norms and gate, and the LM head. Residuals never leave it."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, Tensor],  # noqa: ARG002
        kernels: CDLL | None = None,  # noqa: ARG002
    ) -> None:
        """With `kernels` (afd.native.library) layers are compiled, and attend through a paged cache only."""
        self.spec = spec

    @abstractmethod
    def embed(self, token_ids: Tensor) -> Tensor:
        """[tokens] int64 -> [tokens, hidden]"""

    @abstractmethod
    def layer(self, layer: int, hidden: Tensor, positions: Tensor, kv: KvView) -> AttentionOutput:
        """hidden [tokens, hidden], positions [tokens] int64 -> the attention half of `layer`. Zero tokens is legal."""

    @abstractmethod
    def head(self, hidden: Tensor) -> Generator[None, None, Tensor]:
        """Final norm and LM head: [rows, hidden] -> [rows, vocab] float32. Yields now and then, so that whoever drives
        it may do something more urgent first."""

    def logits(self, hidden: Tensor) -> Tensor:
        """`head` in one go."""
        slices = self.head(hidden)
        while True:
            try:
                next(slices)
            except StopIteration as end:
                logits: Tensor = end.value
                return logits


class FfnHalf(ABC):
    """This shard's part of every layer's FFN. Keeps nothing between calls."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, Tensor],  # noqa: ARG002
        shard: FfnShard,
        kernels: CDLL | None = None,  # noqa: ARG002
    ) -> None:
        """With `kernels` (afd.native.library) layers are compiled."""
        self.spec = spec
        self.shard = shard

    @abstractmethod
    def layer(self, layer: int, y: Tensor, routing: Routing | None) -> Tensor | None:
        """y [tokens, hidden] -> this shard's partial sum [tokens, hidden]; the sum over all ffn_ranks is the layer's
        delta. None when this shard adds nothing (no token chose one of its experts, and it owns nothing else)."""


def no_grad() -> torch.inference_mode:
    """Every forward pass runs under this; one name so that no caller forgets which mode."""
    return torch.inference_mode()
