"""One request's state on its attention worker: tokens, KV blocks, and how far both have got. No tensors."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

from afd.types import FinishReason, GenerateOutput, GenerateRequest, Refusal, SampledToken
from attention_worker.grammar import Matcher


@dataclass(slots=True, eq=False)
class Sequence:
    """Prompt and generated tokens, and the blocks that hold the KV of the first `num_computed` of them. A replay begins
    with what another worker generated, as one begins again that was preempted.

    `owner` names the router connection that asked; its outputs go there. `seed` is the request's, or a random one,
    so that (seed, position) always gives the same draw, whatever batch or worker computes it. `matcher` follows the
    request's grammar through the generated tokens; None: it has none. `arrived_s` and `scheduled_s` (its first step;
    None: it still waits) are monotonic times.
    """

    request: GenerateRequest
    owner: int
    max_context: int
    token_ids: list[int] = field(init=False)
    seed: int = field(init=False)
    block_table: list[int] = field(default_factory=list)
    block_names: list[bytes] = field(default_factory=list)  # of its full blocks, as far as anybody asked
    num_computed: int = 0
    num_published: int = 0  # blocks of block_table that are in the prefix cache, or came out of it
    num_promised: int = 0  # blocks that are or will be in it once the prompt is computed
    num_cached: int | None = None  # tokens that were found computed when it was first admitted
    in_flight: bool = False
    cancelled: bool = False
    matcher: Matcher | None = None
    order: int = 0  # admission order given by the scheduler; lower is older
    arrived_s: float = field(default_factory=time.monotonic)
    scheduled_s: float | None = None
    scored: list[SampledToken] = field(default_factory=list)  # the prompt's, as far as their logprobs are known

    def __post_init__(self) -> None:
        self.token_ids = [*self.request.prompt_token_ids, *self.request.generated_token_ids]
        seed = self.request.sampling.seed
        self.seed = seed if seed is not None else int.from_bytes(os.urandom(8), "little")
        if self.request.sampling.prompt_logprobs and not self.request.generated_token_ids:  # else they were told before
            self.scored += [SampledToken(token_id) for token_id in self.token_ids[:1]]  # nothing comes before it

    @property
    def key(self) -> tuple[int, str]:
        return self.owner, self.request.request_id

    @property
    def urgency(self) -> tuple[int, bool, int]:
        """Who goes first: the lowest, by priority and then by age. A replay is older than what came here itself."""
        return self.request.priority, not self.request.replay, self.order

    @property
    def num_pending(self) -> int:
        """Tokens whose KV is not computed: 1 while decoding, more while (re)computing the prompt."""
        return len(self.token_ids) - self.num_computed

    @property
    def is_scored(self) -> bool:
        """Whether no token of the prompt is without a logprob that it should have."""
        return not self.scored or len(self.scored) >= len(self.request.prompt_token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    def append(self, token: SampledToken, eos_token_ids: tuple[int, ...]) -> GenerateOutput:
        """Takes a sampled token and says what it means for the request."""
        self.token_ids.append(token.token_id)
        reason, stop_token_id = self._finish(token.token_id, eos_token_ids)
        cached = (self.num_cached or 0) if self.num_generated == 1 else 0
        return GenerateOutput(
            self.request.request_id,
            (token,),
            reason,
            stop_token_id,
            cached_tokens=cached,
            queue_s=self._queue_s(),
            prompt=tuple(self.scored) if self.num_generated == 1 else (),
        )

    def end(
        self, reason: FinishReason, error: str = "", *, client_error: bool = False, refused: Refusal = ""
    ) -> GenerateOutput:
        """The output that ends the request without a token."""
        return GenerateOutput(
            self.request.request_id, (), reason, error=error, client_error=client_error, refused=refused
        )

    def _queue_s(self) -> float | None:
        """How long it waited; said once, with the first token."""
        if self.scheduled_s is None or self.num_generated != 1:
            return None
        return self.scheduled_s - self.arrived_s

    def _finish(self, token_id: int, eos_token_ids: tuple[int, ...]) -> tuple[FinishReason | None, int | None]:
        sampling = self.request.sampling
        if self.matcher is not None and self.matcher.take(token_id):  # whatever ignore_eos and min_tokens say
            return "stop", token_id if token_id in eos_token_ids else None
        ends = token_id in sampling.stop_token_ids or (token_id in eos_token_ids and not sampling.ignore_eos)
        if ends and self.num_generated >= sampling.min_tokens:
            return "stop", token_id
        if self.num_generated >= sampling.max_tokens or len(self.token_ids) >= self.max_context:
            return "length", None
        return None, None
