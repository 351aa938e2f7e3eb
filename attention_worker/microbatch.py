"""One microbatch: a coroutine that runs attention halves and is resumed when the FFN side's answer is here."""

from __future__ import annotations

from collections.abc import Callable, Generator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch import Tensor

from afd.models.halves import AttentionHalf, Routing
from afd.transport.frame import Frame
from afd.types import SampledToken
from attention_worker.kv_cache import KvCache
from attention_worker.sampler import Sampler
from attention_worker.scheduler import Batch, Scheduler
from attention_worker.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Dispatch:
    """What a microbatch sends to the FFN side; it goes on with the sum of the partial answers."""

    step: int
    layer: int
    y: Tensor  # [tokens, hidden]
    routing: Routing | None  # None on dense layers


# Yields a dispatch and is sent the delta [tokens, hidden]; yields None when the scheduler has nothing for it.
Coroutine = Generator[Dispatch | None, Tensor | None, None]

# Told a step's batch and one token for each of its chunks that samples, in order.
Complete = Callable[[Batch, list[SampledToken]], None]


@dataclass
class Microbatch:
    """A slice of the running requests that travels through the layers as one, step after step.

    `batch` is what is being computed, None while idle; `dispatch` what the FFN side is asked, `answers` what came
    back of it, by ffn_rank.
    """

    index: int
    model: AttentionHalf
    cache: KvCache
    scheduler: Scheduler
    sampler: Sampler
    complete: Complete
    batch: Batch | None = None
    dispatch: Dispatch | None = None
    sent_at: float = 0.0
    answers: dict[int, Frame] = field(default_factory=dict)
    steps: int = 0

    def __post_init__(self) -> None:
        self._coroutine = self.run()

    def resume(self, ffn_ranks: Seq[int]) -> Dispatch | None:
        """Goes on to the next dispatch, with the sum of the answers if it was waiting for them; None: nothing to do.

        Raises whatever the model raised; the microbatch must then be `reset`.
        """
        if self.dispatch is None:
            self.dispatch = next(self._coroutine)
        else:
            delta = combine(self.dispatch, [self.answers[r] for r in ffn_ranks], self.cache.device)
            self.dispatch, self.answers = None, {}
            self.dispatch = self._coroutine.send(delta)
        return self.dispatch

    def reset(self) -> None:
        """Drops the current step, of which nothing was published, and starts anew with the next."""
        self._coroutine.close()
        self.batch, self.dispatch, self.answers = None, None, {}
        self.steps += 1  # an answer to the dropped step can never be taken for one to the next
        self._coroutine = self.run()

    def run(self) -> Coroutine:
        """Step after step, for ever; `resume` drives it. Closing it drops the current step."""
        while True:
            self.batch = self.scheduler.schedule()
            if self.batch is None:
                yield None
                continue
            logits, sequences = yield from self._step(self.batch)
            tokens = self.sampler.sample(logits, sequences)
            self.steps += 1
            batch, self.batch = self.batch, None
            self.complete(batch, tokens)

    def _step(self, batch: Batch) -> Generator[Dispatch | None, Tensor | None, tuple[Tensor, list[Sequence]]]:
        """All layers of one step -> logits [rows, vocab] of the sequences that sample, and those sequences."""
        device = self.cache.device
        token_ids = [t for c in batch.chunks for t in c.sequence.token_ids[c.start : c.start + c.count]]
        view = self.cache.view(batch)
        hidden = self.model.embed(torch.tensor(token_ids, device=device))  # [tokens, hidden]
        for layer in range(self.model.spec.layers):
            out = self.model.layer(layer, hidden, view.batch.positions, view)
            delta = yield Dispatch(self.steps, layer, out.y, out.routing)
            assert delta is not None, "a microbatch was resumed without its answer"
            hidden = out.residual + delta
        rows, end = [], 0
        for chunk in batch.chunks:
            end += chunk.count
            if chunk.samples:
                rows.append(end - 1)
        return self.model.logits(hidden[rows]), [c.sequence for c in batch.chunks if c.samples]


def combine(dispatch: Dispatch, answers: Seq[Frame], device: torch.device) -> Tensor:
    """The sum of the partial answers [tokens, hidden], in ffn_rank order so that it never depends on arrival."""
    total: Tensor | None = None
    for frame in answers:
        if frame.hidden is not None:
            partial = frame.hidden.to(device)
            total = partial if total is None else total + partial
    return torch.zeros_like(dispatch.y) if total is None else total
