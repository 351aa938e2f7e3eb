"""Matrix products: one projection, several packed into one, and the SwiGLU feed-forward built of two."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Linear:
    """y = x · weightᵀ, without bias."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight  # [out, in]

    @classmethod
    def packed(cls, *weights: Tensor) -> Linear:
        """Several projections of the same input as one product; their outputs lie side by side."""
        return cls(torch.cat(weights))

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        return F.linear(x, self.weight)


class SwiGlu:
    """down · (silu(gate · x) ∘ (up · x)); gate and up [width, hidden], down [hidden, width]."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        self._gate_up = Linear.packed(gate, up)
        self._down = Linear(down.contiguous())  # a slice along its last axis may come as a view

    def __call__(self, x: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]"""
        return self._down(silu_and_multiply(self._gate_up(x)))


def silu_and_multiply(gate_up: Tensor) -> Tensor:
    """[tokens, 2·width], gate beside up -> silu(gate) ∘ up [tokens, width]"""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
