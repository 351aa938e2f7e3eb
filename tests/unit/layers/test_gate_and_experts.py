"""The gate decides the same way everywhere; experts give each token what it chose, however they are cut."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from afd.errors import ModelError
from afd.layers.experts import Experts
from afd.layers.gate import Gate


def test_equal_logits_go_to_the_lowest_expert_ids() -> None:
    weight = torch.zeros(7, 8)
    weight[[2, 4, 5], 0] = 1.0
    ids, weights = Gate(weight, 4, renormalise=True)(torch.ones(3, 8))
    assert ids.tolist() == [[2, 4, 5, 0]] * 3
    assert ids.dtype == torch.int32
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(3))


def test_every_expert_can_be_chosen_at_once_and_then_weights_are_the_softmax() -> None:
    torch.manual_seed(0)
    weight, y = torch.randn(5, 8), torch.randn(11, 8)
    probabilities = (y @ weight.T).softmax(-1)
    for renormalise in (False, True):
        ids, weights = Gate(weight, 5, renormalise=renormalise)(y)
        torch.testing.assert_close(torch.zeros(11, 5).scatter(1, ids.long(), weights), probabilities)


def test_renormalised_weights_sum_to_one_and_others_to_their_share() -> None:
    torch.manual_seed(1)
    weight, y = torch.randn(16, 8), torch.randn(9, 8)
    top = (y @ weight.T).softmax(-1).topk(3).values
    torch.testing.assert_close(Gate(weight, 3, renormalise=False)(y)[1], top)
    torch.testing.assert_close(Gate(weight, 3, renormalise=True)(y)[1], top / top.sum(-1, keepdim=True))


def test_the_gate_of_a_bf16_model_decides_in_float32() -> None:
    weight = torch.zeros(2, 4, dtype=torch.bfloat16)
    weight[0], weight[1] = 1.0, 1.0
    weight[1, 0] = 1 + 2**-7  # one bf16 step: lost if the logits were summed to bf16
    ids, _ = Gate(weight, 1, renormalise=False)(torch.full((1, 4), 1.0, dtype=torch.bfloat16))
    assert ids.item() == 1


def test_an_empty_batch_passes_gate_and_experts() -> None:
    ids, weights = Gate(torch.randn(4, 8), 2, renormalise=True)(torch.empty(0, 8))
    assert ids.shape == weights.shape == (0, 2)
    assert random_experts(4).part(0, 4)(torch.empty(0, 8), ids, weights) is None


class random_experts:
    """Weights of `total` experts, width 6 over hidden 8, and what they should give, by the definition."""

    def __init__(self, total: int, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(total)
        self.total = total
        self.gate, self.up = (torch.randn(total, 6, 8, generator=generator).to(dtype) for _ in range(2))
        self.down = torch.randn(total, 8, 6, generator=generator).to(dtype)

    def part(self, first: int, end: int, columns: slice = slice(None)) -> Experts:
        gate, up, down = self.gate[first:end, columns], self.up[first:end, columns], self.down[first:end, :, columns]
        return Experts(gate, up, down, first=first, total=self.total)

    def expected(self, y: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros(y.shape, dtype=torch.float32)
        for token in range(ids.shape[0]):
            for choice in range(ids.shape[1]):
                e = int(ids[token, choice])
                inner = F.silu(self.gate[e].float() @ y[token].float()) * (self.up[e].float() @ y[token].float())
                out[token] += weights[token, choice] * (self.down[e].float() @ inner)
        return out


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_partial_sums_of_any_cut_add_up_to_every_tokens_experts(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 6), label="experts")
    top_k = data.draw(st.integers(1, total), label="top_k")
    tokens = data.draw(st.integers(0, 9), label="tokens")
    busy = data.draw(st.integers(top_k, total), label="experts in use")
    torch.manual_seed(data.draw(st.integers(0, 99)))
    y, weights = torch.randn(tokens, 8), torch.rand(tokens, top_k)
    ids = torch.stack([torch.randperm(busy)[:top_k] for _ in range(tokens)]) if tokens else torch.empty(0, top_k)
    experts = random_experts(total)
    cut, column = data.draw(st.integers(0, total), label="EP cut"), data.draw(st.integers(0, 6), label="TP cut")
    parts = [
        experts.part(first, end, columns)(y, ids.int(), weights)
        for first, end in ((0, cut), (cut, total))
        for columns in (slice(0, column), slice(column, 6))
    ]
    summed = sum((part for part in parts if part is not None), torch.zeros(tokens, 8))
    torch.testing.assert_close(summed, experts.expected(y, ids, weights), rtol=1e-4, atol=1e-4)
    if cut >= busy:
        assert parts[2] is parts[3] is None, "experts nobody chose must add nothing"


def test_bf16_experts_add_up_in_float32() -> None:
    torch.manual_seed(0)
    experts = random_experts(4, torch.bfloat16)
    y, weights = torch.randn(5, 8).bfloat16(), torch.rand(5, 2)
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(5)]).int()
    out = experts.part(0, 4)(y, ids, weights)
    assert out is not None
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, experts.expected(y, ids, weights), rtol=0.05, atol=0.2)


@pytest.mark.parametrize(("ids", "worst"), [([[0, 4]], 4), ([[-1, 2]], -1)])
def test_an_expert_outside_the_model_is_an_error_that_names_it(ids: list[list[int]], worst: int) -> None:
    experts = random_experts(4).part(1, 3)
    with pytest.raises(ModelError, match=f"expert {worst}, .* experts 0 to 3"):
        experts(torch.randn(1, 8), torch.tensor(ids, dtype=torch.int32), torch.ones(1, 2))
