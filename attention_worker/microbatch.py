"""One microbatch: a coroutine that runs attention halves and is resumed when the FFN side's answer is here."""

from __future__ import annotations

from collections.abc import Callable, Generator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch import Tensor

from afd.models.halves import AttentionHalf, Routing
from afd.pipeline.timeline import Activity, Timeline
from afd.transport.frame import Frame
from afd.types import Role, SampledToken
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


@dataclass(frozen=True, slots=True)
class Pause:
    """A microbatch could go on at once, but lets more urgent ones go first."""


# Yields a dispatch and is sent the delta [tokens, hidden]; yields None when the scheduler has nothing for it.
Coroutine = Generator[Dispatch | Pause | None, Tensor | None, None]

# Told a step's batch and one token for each of its chunks that samples, in order.
Complete = Callable[[Batch, list[SampledToken]], None]


@dataclass
class Microbatch:
    """A slice of the running requests that travels through the layers as one, step after step.

    `batch` is what is being computed, None while idle; `dispatch` what the FFN side is asked, `answers` what came
    back of it, by ffn_rank. While `paused` it waits for nothing but its turn.
    """

    index: int
    model: AttentionHalf
    cache: KvCache
    scheduler: Scheduler
    sampler: Sampler
    complete: Complete
    batch: Batch | None = None
    dispatch: Dispatch | None = None
    paused: bool = False
    sent_at: float = 0.0
    answers: dict[int, Frame] = field(default_factory=dict)
    steps: int = 0
    may_begin: Callable[[], bool] = lambda: True  # false while as many others are under way as there should be
    timeline: Timeline = field(default_factory=lambda: Timeline(Role.ATTENTION, 0))

    def __post_init__(self) -> None:
        self._coroutine = self.run()

    def resume(self, ffn_ranks: Seq[int]) -> Dispatch | None:
        """Goes on to the next dispatch, with the sum of the answers if it was waiting for them; None: it paused, or
        there is nothing to do.

        Raises whatever the model raised; the microbatch must then be `reset`.
        """
        if self.dispatch is None:
            yielded = next(self._coroutine)
        else:
            self.timeline.mark(Activity.COMBINE, self.index, self.dispatch.step, self.dispatch.layer)
            delta = combine(self.dispatch, [self.answers[r] for r in ffn_ranks], self.cache.device)
            self.dispatch, self.answers = None, {}
            yielded = self._coroutine.send(delta)
        self.paused = isinstance(yielded, Pause)
        self.dispatch = None if isinstance(yielded, Pause) else yielded
        return self.dispatch

    def reset(self) -> None:
        """Drops the current step, of which nothing was published, and starts anew with the next."""
        self._coroutine.close()
        self.batch, self.dispatch, self.paused, self.answers = None, None, False, {}
        self.steps += 1  # an answer to the dropped step can never be taken for one to the next
        self._coroutine = self.run()

    def run(self) -> Coroutine:
        """Step after step, for ever; `resume` drives it. Closing it drops the current step."""
        while True:
            began_ns = self.timeline.mark(Activity.SCHEDULE, self.index, self.steps)
            self.batch = self.scheduler.schedule() if self.may_begin() else None
            if self.batch is None:
                yield None
                continue
            logits, sequences = yield from self._step(self.batch)
            self.timeline.mark(Activity.SAMPLE, self.index, self.steps, 0, len(sequences))
            tokens = self.sampler.sample(logits, sequences)
            self.steps += 1
            batch, self.batch = self.batch, None
            self.complete(batch, tokens)
            self.timeline.work.observe((self.timeline.mark(Activity.OTHER) - began_ns) / 1e9)

    def _step(self, batch: Batch) -> Generator[Dispatch | Pause | None, Tensor | None, tuple[Tensor, list[Sequence]]]:
        """All layers of one step -> logits [rows, vocab] of the sequences that sample, and those sequences."""
        device = self.cache.device
        token_ids = [t for c in batch.chunks for t in c.sequence.token_ids[c.start : c.start + c.count]]
        view = self.cache.view(batch)
        hidden = self.model.embed(torch.tensor(token_ids, device=device))  # [tokens, hidden]
        for layer in range(self.model.spec.layers):
            self.timeline.mark(Activity.ATTENTION, self.index, self.steps, layer, len(token_ids))
            out = self.model.layer(layer, hidden, view.batch.positions, view)
            delta = yield Dispatch(self.steps, layer, out.y, out.routing)
            assert delta is not None, "a microbatch was resumed without its answer"
            hidden = out.residual + delta
        rows, sampled, begin = list[int](), list[int](), 0
        scored: list[tuple[Sequence, slice]] = []
        for chunk in batch.chunks:
            if scores := chunk.scores:
                scored.append((chunk.sequence, slice(len(rows), len(rows) + len(scores))))
                rows += [begin + position - chunk.start for position in scores]
            begin += chunk.count
            if chunk.samples:
                sampled.append(len(rows))
                rows.append(begin - 1)
        logits = yield from self._head(hidden[rows])
        for sequence, part in scored:
            self.sampler.score(logits[part], sequence)
        return logits[sampled] if scored else logits, [c.sequence for c in batch.chunks if c.samples]

    def _head(self, hidden: Tensor) -> Generator[Pause, Tensor | None, Tensor]:
        """hidden [rows, hidden] -> logits [rows, vocab], with pauses."""
        slices = self.model.head(hidden)
        while True:
            self.timeline.mark(Activity.HEAD, self.index, self.steps, 0, len(hidden))
            try:
                next(slices)
            except StopIteration as end:
                logits: Tensor = end.value
                return logits
            yield Pause()


def combine(dispatch: Dispatch, answers: Seq[Frame], device: torch.device) -> Tensor:
    """The sum of the partial answers [tokens, hidden], in ffn_rank order so that it never depends on arrival."""
    total: Tensor | None = None
    for frame in answers:
        if frame.hidden is not None:
            partial = frame.hidden.to(device)
            total = partial if total is None else total + partial
    return torch.zeros_like(dispatch.y) if total is None else total
