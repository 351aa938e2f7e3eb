"""Who asked for what: takes requests in, follows them through the steps, and says what each one got. No tensors.

Belongs to the engine's thread. Every request added ends with exactly one output that has a finish_reason, unless it
was cancelled, after which nothing more is said of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from afd.types import GenerateOutput, GenerateRequest, Refusal, SampledToken
from attention_worker.grammar import Matcher
from attention_worker.scheduler import Batch, Scheduler
from attention_worker.sequence import Sequence

# Told, once a step, what requests got: (owner, output) pairs. Called from the engine's thread; must not block.
Publish = Callable[[list[tuple[int, GenerateOutput]]], None]

# Given a sequence with a grammar. What comes of it is told to `Requests.compiled`, later, on the engine's thread.
Compile = Callable[[Sequence], None]


class Requests:
    """`problem`, once set, is the sentence with which new requests are refused."""

    def __init__(
        self,
        scheduler: Scheduler,
        publish: Publish,
        *,
        vocab: int,
        eos_token_ids: tuple[int, ...],
        max_context: int,
        max_waiting: int,
        compile_grammar: Compile | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.vocab = vocab
        self.eos_token_ids = eos_token_ids
        self.max_context = max_context
        self.max_waiting = max_waiting
        self.problem = ""
        self.none_left = threading.Event()
        self.none_left.set()
        self.generated_tokens = 0
        self.prompt_tokens = 0  # computed, recomputation after a preemption included
        self._publish = publish
        self._compile = compile_grammar
        self._compiling: set[Sequence] = set()
        self._living: dict[tuple[int, str], Sequence] = {}
        self._outputs: list[tuple[int, GenerateOutput]] = []

    def add(self, owner: int, request: GenerateRequest) -> None:
        """Queues a request, or refuses it with an output."""
        sequence = Sequence(request, owner, self.max_context)
        refusal = self._refusal(sequence)
        if refusal:
            self._outputs.append((owner, sequence.end("error", refusal, client_error=True)))
        elif self.problem:
            self._outputs.append((owner, sequence.end("error", self.problem, refused="unavailable")))
        elif len(self.scheduler.waiting) + len(self._compiling) >= self.max_waiting and not request.replay:
            full = f"{self.max_waiting} requests are waiting already (attention.max_waiting)"
            self._outputs.append((owner, sequence.end("error", full, refused="full")))
        else:
            self._living[sequence.key] = sequence
            self.none_left.clear()
            if request.grammar and self._compile is not None:
                self._compiling.add(sequence)
                self._compile(sequence)
            else:
                self.scheduler.add(sequence)

    def compiled(self, sequence: Sequence, outcome: Matcher | str) -> None:
        """Queues a request whose grammar was compiled, or ends it with the sentence on why it was not."""
        if sequence not in self._compiling:
            return  # cancelled or failed meanwhile
        self._compiling.remove(sequence)
        if isinstance(outcome, Matcher):
            outcome.follow(sequence.request.generated_token_ids)
            if not outcome.problem:
                sequence.matcher = outcome
                self.scheduler.add(sequence)
                return
            outcome = outcome.problem
        self._refuse(sequence, outcome)

    def cancel(self, owner: int, request_id: str) -> None:
        """Frees an idle request's blocks now, one in flight's when its step ends. Unknown ids are ignored."""
        sequence = self._living.get((owner, request_id))
        if sequence is not None:
            sequence.cancelled = True
            self._drop(sequence)

    def cancel_all_of(self, owner: int) -> None:
        for key in [key for key in self._living if key[0] == owner]:
            self.cancel(*key)

    def complete(self, batch: Batch, tokens: list[SampledToken]) -> None:
        """A step is over: takes its tokens, and lets go of who is done or was cancelled meanwhile."""
        self.scheduler.complete(batch, time.monotonic())
        sampled = iter(tokens)
        for chunk in batch.chunks:
            sequence = chunk.sequence
            self.prompt_tokens += 0 if chunk.is_decode else chunk.count
            # `complete` does not change what chunk.samples compares: tokens are appended here only.
            if chunk.samples:
                self.generated_tokens += 1
                token = next(sampled)
                if sequence.matcher is not None and sequence.matcher.problem and not sequence.cancelled:
                    self._refuse(sequence, sequence.matcher.problem)
                elif not sequence.cancelled:
                    output = sequence.append(token, self.eos_token_ids)
                    self._outputs.append((sequence.owner, output))
                    if output.finish_reason:
                        self._drop(sequence)
            if sequence.cancelled:
                self.scheduler.remove(sequence)

    def fail(self, sequences: Iterable[Sequence], sentence: str, refused: Refusal = "") -> None:
        """Ends `sequences`, none of which is being computed any more, with an error."""
        for sequence in sequences:
            sequence.in_flight = False
            if sequence.cancelled:
                self.scheduler.remove(sequence)
            else:
                self._outputs.append((sequence.owner, sequence.end("error", sentence, refused=refused)))
                self._drop(sequence)

    def fail_all(self, sentence: str) -> None:
        """Ends every request; none is being computed any more. Another worker may take those without a token."""
        self.fail([*self.scheduler.all(), *self._compiling], sentence, refused="unavailable")

    def flush(self) -> None:
        """Publishes what was said since the last flush."""
        if self._outputs:
            outputs, self._outputs = self._outputs, []
            self._publish(outputs)
        if not self._living:
            self.none_left.set()

    def _refuse(self, sequence: Sequence, sentence: str) -> None:
        """Ends a request whose own fault it is."""
        self._outputs.append((sequence.owner, sequence.end("error", sentence, client_error=True)))
        self._drop(sequence)

    def _drop(self, sequence: Sequence) -> None:
        self._living.pop(sequence.key, None)
        self._compiling.discard(sequence)
        if not sequence.in_flight:
            self.scheduler.remove(sequence)

    def _refusal(self, sequence: Sequence) -> str:
        """Why the request can never be served, in a sentence; "" when it can."""
        request = sequence.request
        prompt, generated, limit = len(request.prompt_token_ids), len(request.generated_token_ids), self.max_context
        used = [*sequence.token_ids, *request.sampling.named_token_ids]
        if sequence.key in self._living:
            return f"request_id {request.request_id!r} is already in use on this connection"
        if not prompt:
            return "the prompt is empty; it needs at least one token"
        if prompt >= limit:
            return (
                f"the prompt has {prompt} tokens, and the longest context is {limit} tokens, prompt and answer together"
            )
        if prompt + generated >= limit:
            return f"the prompt has {prompt} tokens and the answer {generated} so far; the longest context is {limit}"
        if request.sampling.max_tokens < 1:
            return f"max_tokens is {request.sampling.max_tokens}; it must be at least 1"
        if generated >= request.sampling.max_tokens:
            return f"{generated} tokens are generated already, and max_tokens is {request.sampling.max_tokens}"
        if request.grammar and self._compile is None:
            return "this worker follows no grammars"
        if min(used) < 0 or max(used) >= self.vocab:
            wrong = next(t for t in used if not 0 <= t < self.vocab)
            return f"token id {wrong} is outside the vocabulary of {self.vocab}"
        return ""
