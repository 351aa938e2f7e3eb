"""Which microbatch goes next: the engine's choice, without an engine. No tensors, no clock of its own.

`afd simulate` (attention_worker.replay) makes its choices here too, so what it forecasts is what the engine does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from typing import Protocol, TypeVar

# Unanswered dispatches that keep the FFN side busy for a while: one is computed, one waits.
ENOUGH = 2


class Travelling(Protocol):
    """A microbatch as far as the choice goes (attention_worker.microbatch.Microbatch): idle, paused, or sent."""

    @property
    def batch(self) -> object | None:
        """What is being computed; None: idle."""

    @property
    def answers(self) -> Sized:
        """The FFN side's answers that are here."""

    @property
    def paused(self) -> bool:
        """It waits for nothing but its turn."""

    @property
    def sent_at(self) -> float:
        """When its dispatch was sent, in seconds of whatever clock."""


M = TypeVar("M", bound=Travelling)


def choose(microbatches: Sequence[M], num_ffn: int, may_begin: Callable[[], bool]) -> M | None:
    """An idle microbatch, if `may_begin` says that there is work for one more (so that the pipeline fills first); else
    the one whose `num_ffn` answers are here, the oldest first; or a paused one, where none is or the FFN side has
    enough to do for a while; None: there is nothing to do but wait."""
    idle = paused = oldest = None
    unanswered = 0
    for m in microbatches:
        if m.batch is None:
            idle = idle or m
        elif m.paused:
            paused = paused or m
        elif len(m.answers) < num_ffn:
            unanswered += 1
        elif oldest is None or m.sent_at < oldest.sent_at:
            oldest = m
    if idle is not None and may_begin():
        return idle
    if paused is not None and (oldest is None or unanswered >= ENOUGH):
        return paused
    return oldest


def has_room(microbatches: Sequence[Travelling], wanted: int) -> bool:
    """Whether fewer microbatches are under way than there should be."""
    return sum(m.batch is not None for m in microbatches) < wanted
