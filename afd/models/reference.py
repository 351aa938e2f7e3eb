"""The oracle: both halves of a model glued back together in one place, with the simplest KV cache there is."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from afd.layers.attention.plain import causal_attention
from afd.models.halves import AttentionHalf, FfnHalf, no_grad
from afd.spec import ModelSpec


class ContiguousKv:
    """A KvView of one sequence: every layer's keys and values in one growing tensor each."""

    def __init__(self) -> None:
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if layer in self._keys:
            k, v = torch.cat((self._keys[layer], k)), torch.cat((self._values[layer], v))
        self._keys[layer], self._values[layer] = k, v
        return causal_attention(q, k, v, scale)


class WholeModel:
    """An attention half and an unsharded FFN half (FfnShard(0, 1, 1)) as one model; one sequence at a time. `device`
    is where the halves' weights are."""

    def __init__(
        self, spec: ModelSpec, attention: AttentionHalf, ffn: FfnHalf, device: torch.device | str = "cpu"
    ) -> None:
        assert ffn.shard.size == 1, f"the oracle needs the whole FFN, not shard {ffn.shard}"
        self.spec = spec
        self._device = torch.device(device)
        self.attention = attention
        self.ffn = ffn

    def forward(self, token_ids: Sequence[int]) -> Tensor:
        """Logits after every token, [tokens, vocab] float32."""
        with no_grad():
            return self.attention.logits(self._hidden(token_ids, 0, ContiguousKv()))

    def generate(self, prompt_ids: Sequence[int], max_tokens: int, eos_ids: Collection[int] = ()) -> list[int]:
        """Greedy continuation, at most `max_tokens`; ends after a token of `eos_ids`, which is included."""
        return self.generate_with_logits(prompt_ids, max_tokens, eos_ids)[0]

    def generate_with_logits(
        self, prompt_ids: Sequence[int], max_tokens: int, eos_ids: Collection[int] = ()
    ) -> tuple[list[int], Tensor]:
        """`generate`, with the logits each token was chosen from, [generated, vocab] float32: where the best two are
        close, another order of additions may rightly choose the other."""
        kv, generated, rows, position = ContiguousKv(), list[int](), list[Tensor](), 0
        fresh = list(prompt_ids)
        with no_grad():
            while len(generated) < max_tokens and not (generated and generated[-1] in eos_ids):
                last = self._hidden(fresh, position, kv)[-1:]
                position += len(fresh)
                rows.append(self.attention.logits(last))
                fresh = [int(rows[-1].argmax())]
                generated += fresh
            return generated, torch.cat(rows) if rows else torch.empty(0, self.spec.vocab)

    def _hidden(self, token_ids: Sequence[int], position: int, kv: ContiguousKv) -> Tensor:
        positions = torch.arange(position, position + len(token_ids), device=self._device)
        hidden = self.attention.embed(torch.tensor(token_ids, dtype=torch.int64, device=self._device))
        for layer in range(self.spec.layers):
            out = self.attention.layer(layer, hidden, positions, kv)
            delta = self.ffn.layer(layer, out.y, out.routing)
            hidden = out.residual if delta is None else out.residual + delta
        return hidden  # [tokens, hidden]
