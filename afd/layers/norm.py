"""RMS normalisation, computed in float32 whatever the dtype of the activations (as transformers does)."""

from __future__ import annotations

import torch
from torch import Tensor


class RmsNorm:
    """x / rms(x) · weight over the last axis."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight  # [width]
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width], same dtype."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(self.eps))
        return (wide * scale).to(x.dtype).mul_(self.weight)
