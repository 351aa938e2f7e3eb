"""The attention worker's policies without its tensors, for simulations: afd.planner.simulate.policies' AttentionPolicy.

The scheduler, the tuner and the choice of the next microbatch are the engine's own. Only their surroundings are made
up: sequences have a number of tokens in place of tokens, and time is the simulation's.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import TypeVar

from afd.errors import ConfigError
from afd.planner.simulate.policies import Limits, Step
from afd.types import GenerateRequest, SampledToken, SamplingParams
from attention_worker.block_manager import BlockManager
from attention_worker.choice import Travelling, choose, has_room
from attention_worker.scheduler import Batch, Scheduler
from attention_worker.sequence import Sequence
from attention_worker.tuner import MicrobatchTuner

M = TypeVar("M", bound=Travelling)

_TOKEN = SampledToken(0)


class _Prompt(tuple[int, ...]):
    """So many tokens, whichever they are: a context of 32,768 takes no more memory than one of 1."""

    length: int

    @classmethod
    def of(cls, length: int) -> _Prompt:
        prompt = cls()
        prompt.length = length
        return prompt

    def __len__(self) -> int:
        return self.length


class _Tokens(list[int]):
    """The same for tokens that grow in number."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def __len__(self) -> int:
        return self.length

    def append(self, _: int) -> None:
        self.length += 1


class Replay:
    """One attention worker's decisions; owned by one thread."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self._weight = weight = limits.weight
        self._clock = clock
        self._tuner = MicrobatchTuner(limits.microbatches) if limits.auto else None
        self._scheduler = Scheduler(
            BlockManager(max(1, limits.kv_tokens // weight // limits.block_size), limits.block_size),
            microbatches=self._tuner.choice if self._tuner else limits.microbatches,
            max_batch_tokens=max(1, limits.max_batch_tokens // weight),
            max_running=max(1, limits.max_running // weight),
            target_s=limits.target_s,
            prefix_cache=False,  # what prompts have in common is not simulated
            clock=clock,
        )
        self._starved = False  # as in the engine: ask the scheduler again only when something changed

    @property
    def preemptions(self) -> int:
        return self._scheduler.preemptions

    def warm(self, request: int, context: int, tokens: int) -> None:
        sequence = self._sequence(request, context - 1, tokens + 1)
        sequence.token_ids.append(0)
        self._add(sequence)
        scheduler = self._scheduler
        fits = scheduler.blocks.grow(sequence.block_table, len(sequence.token_ids))
        if not fits or len(scheduler.running) == scheduler.max_running:
            holds = scheduler.blocks.num_blocks * scheduler.blocks.block_size * self._weight
            raise ConfigError(
                f"{(len(scheduler.running) + 1) * self._weight} requests of {context} tokens do not fit an attention "
                f"worker: its KV cache holds {holds} tokens, and "
                f"it runs at most {scheduler.max_running * self._weight} (attention.max_running)"
            )
        scheduler.waiting.remove(sequence)
        scheduler.running.append(sequence)
        sequence.num_computed = context - 1
        sequence.scheduled_s = self._clock()

    def add(self, request: int, prompt: int, tokens: int) -> None:
        holds = self._scheduler.blocks.num_blocks * self._scheduler.blocks.block_size
        if prompt + tokens > holds:
            raise ConfigError(
                f"a request of {prompt + tokens} tokens does not fit an attention worker's KV cache of "
                f"{holds * self._weight} tokens"
            )
        self._add(self._sequence(request, prompt, tokens))

    def choose(self, microbatches: Seq[M], num_ffn: int) -> M | None:
        return choose(microbatches, num_ffn, lambda: self._may_begin(microbatches))

    def schedule(self, microbatches: Seq[Travelling]) -> Step | None:
        room = has_room(microbatches, self._scheduler.microbatches)
        batch = self._scheduler.schedule() if room else None
        self._starved = batch is None
        return _step(batch, self._weight) if batch else None

    def complete(self, step: Step, now_s: float) -> list[int]:
        batch = step.batch
        assert isinstance(batch, Batch), "a step of somebody else's scheduler"
        self._starved = False
        sampling = [chunk.sequence for chunk in batch.chunks if chunk.samples]
        self._scheduler.complete(batch, now_s)
        for sequence in sampling:
            if sequence.append(_TOKEN, ()).finish_reason:
                self._scheduler.remove(sequence)
        if self._tuner:
            running, prompts = len(self._scheduler.running), batch.prompt_tokens
            self._scheduler.microbatches = self._tuner.observe(
                now_s, step.samples, running * self._weight, prompts * self._weight
            )
        return [sequence.owner for sequence in sampling]

    def check(self) -> None:
        """The scheduler's invariants."""
        self._scheduler.check()

    def _may_begin(self, microbatches: Seq[Travelling]) -> bool:
        scheduler = self._scheduler
        return not self._starved and has_room(microbatches, scheduler.microbatches) and scheduler.has_work()

    def _add(self, sequence: Sequence) -> None:
        self._scheduler.add(sequence)
        self._starved = False

    def _sequence(self, number: int, prompt: int, tokens: int) -> Sequence:
        request = GenerateRequest(str(number), _Prompt.of(prompt), SamplingParams(max_tokens=tokens, seed=0))
        sequence = Sequence(request, number, max_context=prompt + tokens + 1, arrived_s=self._clock())
        sequence.token_ids = _Tokens(prompt)
        return sequence


def _step(batch: Batch, weight: int) -> Step:
    tokens = context = samples = 0
    for chunk in batch.chunks:
        tokens += chunk.count
        context += chunk.start + chunk.count
        samples += chunk.samples
    return Step(batch, tokens * weight, context * weight, samples * weight)
