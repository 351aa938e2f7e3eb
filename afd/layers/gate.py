"""The MoE gate: which experts a token goes to, and with what weight. It runs on the attention side."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Gate:
    """Softmax over all experts, then the top k; everything in float32.

    Equal logits are decided for the lowest expert id, so that the choice is the same on every machine and in every
    batch (torch.topk promises no order among equals).
    """

    def __init__(self, weight: Tensor, top_k: int, *, renormalise: bool) -> None:
        self.weight = weight.float()  # [experts, hidden]
        self._top_k = top_k
        self._renormalise = renormalise

    def __call__(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """y [tokens, hidden] -> expert ids int32 and weights float32, both [tokens, top_k], best expert first."""
        logits = F.linear(y.float(), self.weight)  # [tokens, experts]
        ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, : self._top_k]
        weights = logits.softmax(dim=-1).gather(-1, ids)
        if self._renormalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return ids.to(torch.int32), weights
