"""How long a simulated worker takes: stage times (afd.planner.stages), asked once for each load and remembered."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from afd.planner.simulate.policies import Step
from afd.planner.stages import StageTimes

# Loads that are remembered: all of a step's layers are asked at once, and workers that are alike ask the same.
_REMEMBERED = 4096


class Clock:
    """Seconds, undisturbed; a sequence has one for each layer."""

    def __init__(self, times: StageTimes) -> None:
        layers = range(times.num_layers)
        self.layers = times.num_layers
        self.latency_s = times.latency_s
        self.ends_s = times.ends_s
        self.ffn_s = times.ffn_s

        @lru_cache(_REMEMBERED)
        def attention_s(tokens: int, context: int) -> Sequence[float]:
            return [times.attention_s(layer, tokens, context) for layer in layers]

        @lru_cache(_REMEMBERED)
        def dispatch_s(tokens: int) -> Sequence[float]:
            return [times.dispatch_s(layer, tokens) for layer in layers]

        @lru_cache(_REMEMBERED)
        def combine_s(tokens: int) -> Sequence[float]:
            return [times.combine_s(layer, tokens) for layer in layers]

        self._attention_s, self.dispatch_s, self.combine_s = attention_s, dispatch_s, combine_s

    def attention_s(self, step: Step) -> Sequence[float]:
        return self._attention_s(step.tokens, step.context)
