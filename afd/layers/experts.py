"""A run of whole or sliced experts, applied to the tokens that chose them."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from afd.errors import ModelError
from afd.layers.linear import silu_and_multiply


class Experts:
    """SwiGLU experts `first` … `first + local - 1` out of `total`; others belong to other EP groups.

    gate and up [local, width, hidden], down [local, hidden, width], where width may be a TP slice of the intermediate.
    """

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, *, first: int, total: int) -> None:
        assert gate.shape == up.shape == (down.shape[0], down.shape[2], down.shape[1]), (
            f"expert weights do not fit together: gate {gate.shape}, up {up.shape}, down {down.shape}"
        )
        self._gate_up = torch.cat((gate, up), dim=1)  # [local, 2·width, hidden]
        self._down = down.contiguous()
        self._total = total
        # Where each local expert's tokens begin among all sorted choices, and where valid ids begin and end.
        edges = [0, *range(first, first + gate.shape[0] + 1), total]
        self._edges = torch.tensor(edges, dtype=torch.int32, device=gate.device)

    def __call__(self, y: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor | None:
        """y [tokens, hidden], ids int32 and weights float32 [tokens, top_k] -> the weighted sum of this run's experts
        [tokens, hidden] float32, or None when no token chose any of them.

        A token's experts are added in the order of its choices, whoever else is in the batch. Raises ModelError for
        an expert id outside the model.
        """
        num_tokens, top_k = expert_ids.shape
        sorted_ids, order = expert_ids.flatten().sort(stable=True)
        low, *starts, high = torch.searchsorted(sorted_ids, self._edges).tolist()
        if low != 0 or high != sorted_ids.numel():
            worst = int(sorted_ids[0 if low else -1])
            raise ModelError(f"a token was sent to expert {worst}, but the model has experts 0 to {self._total - 1}")
        begin, end = starts[0], starts[-1]
        if begin == end or self._down.shape[2] == 0:
            return None
        chosen = order[begin:end]  # positions in [tokens · top_k], expert by expert
        inputs = y.index_select(0, chosen // top_k)
        outputs = torch.empty_like(inputs)
        for expert, (a, b) in enumerate(pairwise(starts)):
            if a < b:
                here = slice(a - begin, b - begin)
                inner = silu_and_multiply(F.linear(inputs[here], self._gate_up[expert]))
                torch.mm(inner, self._down[expert].t(), out=outputs[here])
        weighted = outputs.float().mul_(expert_weights.flatten().index_select(0, chosen)[:, None])
        # Not index_add_: on CUDA its order of additions, and so the last bits, would differ from run to run.
        spread = weighted.new_zeros(num_tokens * top_k, y.shape[1]).index_copy_(0, chosen, weighted)
        return spread.view(num_tokens, top_k, -1).sum(dim=1)
