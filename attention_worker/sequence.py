"""One request's state on its attention worker: tokens, KV blocks, and how far both have got. No tensors."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from afd.types import FinishReason, GenerateOutput, GenerateRequest, SampledToken
from attention_worker.grammar import Matcher


@dataclass(slots=True, eq=False)
class Sequence:
    """Prompt and generated tokens, and the blocks that hold the KV of the first `num_computed` of them.

    `owner` names the router connection that asked; its outputs go there. `seed` is the request's, or a random one,
    so that (seed, position) always gives the same draw, whatever batch or worker computes it. `matcher` follows the
    request's grammar through the generated tokens; None: it has none.
    """

    request: GenerateRequest
    owner: int
    max_context: int
    token_ids: list[int] = field(init=False)
    seed: int = field(init=False)
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0
    in_flight: bool = False
    cancelled: bool = False
    matcher: Matcher | None = None
    order: int = 0  # admission order given by the scheduler; lower is older

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)
        seed = self.request.sampling.seed
        self.seed = seed if seed is not None else int.from_bytes(os.urandom(8), "little")

    @property
    def key(self) -> tuple[int, str]:
        return self.owner, self.request.request_id

    @property
    def num_pending(self) -> int:
        """Tokens whose KV is not computed: 1 while decoding, more while (re)computing the prompt."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    def append(self, token: SampledToken, eos_token_ids: tuple[int, ...]) -> GenerateOutput:
        """Takes a sampled token and says what it means for the request."""
        self.token_ids.append(token.token_id)
        reason, stop_token_id = self._finish(token.token_id, eos_token_ids)
        return GenerateOutput(self.request.request_id, (token,), reason, stop_token_id)

    def end(self, reason: FinishReason, error: str = "", *, client_error: bool = False) -> GenerateOutput:
        """The output that ends the request without a token."""
        return GenerateOutput(self.request.request_id, (), reason, error=error, client_error=client_error)

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
