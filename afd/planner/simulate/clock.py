"""How long a simulated worker takes. The simulator asks in counts, never token by token; what answers is a cost model,
or a profile of a machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from afd.planner.simulate.policies import Step


@dataclass(frozen=True, slots=True)
class Link:
    """One worker's way to the others: bytes per second in each direction, and seconds until the first one is there."""

    bytes_per_s: float
    latency_s: float


class Clock(Protocol):
    """Seconds and bytes of one worker, undisturbed. It is asked the same again and again, and must answer the same."""

    @property
    def layers(self) -> int: ...

    @property
    def attention_link(self) -> Link: ...

    @property
    def ffn_link(self) -> Link: ...

    @property
    def message_s(self) -> float:
        """What a worker's thread spends on writing one message, and on taking one in."""

    def attention_s(self, step: Step) -> Sequence[float]:
        """The attention half of each layer."""

    def ffn_s(self, layer: int, tokens: int, load: float) -> float:
        """The FFN half of `layer` for `tokens` tokens on one FFN worker. `load`: routed tokens of its EP group over an
        even share."""

    def begin_s(self, step: Step) -> float:
        """Before the first layer: picking the requests, embedding their tokens."""

    def head_s(self, samples: int) -> float:
        """After the last layer: norm, LM head and sampling."""

    def head_slices(self, samples: int) -> int:
        """In how many pieces the LM head is computed; more urgent microbatches may go between two."""

    def dispatch_bytes(self, layer: int, tokens: int) -> int:
        """To one FFN worker."""

    def combine_bytes(self, tokens: int) -> int:
        """From one FFN worker."""


@dataclass(frozen=True, slots=True)
class LinearClock:
    """Everything is a constant and a slope: the simplest machine there is. Seconds; `per_context` is per token of KV
    that is read."""

    layers: int
    attention_link: Link
    ffn_link: Link
    attention_fixed_s: float
    attention_per_token_s: float
    attention_per_context_s: float
    ffn_fixed_s: float
    ffn_per_token_s: float
    head_per_token_s: float = 0.0
    step_s: float = 0.0
    message_s: float = 0.0
    slices: int = 1
    dispatch_bytes_per_token: int = 0
    combine_bytes_per_token: int = 0

    def attention_s(self, step: Step) -> Sequence[float]:
        took_s = self.attention_fixed_s + self.attention_per_token_s * step.tokens
        return [took_s + self.attention_per_context_s * step.context] * self.layers

    def ffn_s(self, layer: int, tokens: int, load: float) -> float:
        return self.ffn_fixed_s + self.ffn_per_token_s * tokens * load

    def begin_s(self, step: Step) -> float:
        return self.step_s

    def head_s(self, samples: int) -> float:
        return self.head_per_token_s * samples

    def head_slices(self, samples: int) -> int:
        return self.slices

    def dispatch_bytes(self, layer: int, tokens: int) -> int:
        return self.dispatch_bytes_per_token * tokens

    def combine_bytes(self, tokens: int) -> int:
        return self.combine_bytes_per_token * tokens
