"""What the simulator asks of the workers' policies.

Nothing in afd imports a role, so the policies come in as factories: `afd simulate` names them by strings and loads them
where it runs (afd.commands.simulate), as the cluster does with the roles themselves. They are the engine's and the FFN
loop's own objects: attention_worker.replay puts the real Scheduler, MicrobatchTuner and choice behind this interface,
and ffn_worker.batcher.Batcher is used as it is. Neither imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar


@dataclass(frozen=True, slots=True)
class Limits:
    """An attention worker's settings, as in afd.config.AttentionSection, in requests and tokens. `kv_tokens`: what its
    KV cache holds. `weight`: how many requests one sequence of the scheduler stands for. They arrive and end together
    and are of one length, so the scheduler treats them alike; limits are divided by it."""

    microbatches: int
    auto: bool  # the number of microbatches is found by trying, up to `microbatches`
    max_batch_tokens: int
    max_running: int
    kv_tokens: int
    block_size: int = 16
    target_s: float | None = None
    weight: int = 1


@dataclass(frozen=True, slots=True)
class Step:
    """What a microbatch computes in one step, as counts: all that its time depends on."""

    batch: object  # the scheduler's own
    tokens: int
    context: int  # tokens of KV that are read: each sequence's once, a prompt's chunk too
    samples: int  # tokens it gives


class Travelling(Protocol):
    """A microbatch as far as the engine's choice goes; see attention_worker.choice."""

    @property
    def batch(self) -> object | None: ...

    @property
    def answers(self) -> Sized: ...

    @property
    def paused(self) -> bool: ...

    @property
    def sent_at(self) -> float: ...


M = TypeVar("M", bound=Travelling)


class AttentionPolicy(Protocol):
    """Everything an attention worker decides. One for each; times are those of the clock it was built with."""

    def warm(self, request: int, context: int, tokens: int) -> None:
        """Takes sequence number `request`, whose prompt was computed elsewhere: `context` tokens are there, the last of
        them generated, and `tokens` more are wanted. Raises ConfigError when the KV cache has no room for it."""

    def add(self, request: int, prompt: int, tokens: int) -> None:
        """Queues sequence number `request`: its prompt is to be computed, then `tokens` tokens are wanted. Raises
        ConfigError when the KV cache could never hold it."""

    def choose(self, microbatches: Sequence[M], num_ffn: int) -> M | None:
        """Which one goes next; None: there is nothing to do but wait."""

    def schedule(self, microbatches: Sequence[Travelling]) -> Step | None:
        """The next step of an idle one of `microbatches`; None: there is nothing for it."""

    def complete(self, step: Step, now_s: float) -> list[int]:
        """A step is over: which sequences got a token."""

    @property
    def preemptions(self) -> int:
        """Sequences that lost their KV blocks so far."""


class Batcher(Protocol):
    """Which dispatches an FFN worker computes together: ffn_worker.batcher.Batcher."""

    def add(self, item: Any) -> None: ...

    def next(self, now_s: float) -> list[Any]: ...

    def answered(self, items: Sequence[Any], now_s: float) -> None: ...

    def patience_s(self, now_s: float) -> float | None: ...

    def keep(self, attention_ranks: frozenset[int]) -> None: ...


@dataclass(frozen=True, slots=True)
class Policies:
    """`item(attention_rank, microbatch, layer, arrived_s, payload)` is what a batcher takes."""

    attention: Callable[[Limits, Callable[[], float]], AttentionPolicy]
    batcher: Callable[[int, float], Batcher]  # (layers, gather window in seconds)
    item: Callable[[int, int, int, float, Any], Any]
