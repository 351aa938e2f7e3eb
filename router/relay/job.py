"""What one request asks of the workers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from secrets import randbits

from afd.types import GenerateRequest, SamplingParams
from router.answers.choice import Choice, TextRules
from router.relay.terms import Terms
from router.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Job:
    """What to generate: `n` choices for each prompt. Choice j of prompt i has index i * n + j."""

    job_id: str
    prompts: tuple[tuple[int, ...], ...]
    sampling: tuple[SamplingParams, ...]  # one per prompt: max_tokens may depend on its length
    n: int
    rules: TextRules = field(default_factory=TextRules)
    terms: Terms = field(default_factory=Terms)
    best: int | None = None  # of the n choices of a prompt, so many are answers (router.answers.best); None: all
    echoes: tuple[str, ...] = ()  # per prompt, the text that its answers begin with
    grammar: str = ""  # of every choice

    @property
    def num_kept(self) -> int:
        """Of the choices of a prompt, how many are answers."""
        return self.n if self.best is None else self.best

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    def choices(self, tokenizer: Tokenizer) -> list[Choice]:
        """Fresh choices, in the order of their index. A seed is offset by the choice's place among the n of a prompt,
        so that choices differ and equal prompts have equal answers. Where the client gave none, each choice has a
        random one, which stays when it goes on at another worker."""
        return [
            Choice(i * self.n + j, self._worker_request(i, j), self.rules, tokenizer)
            for i in range(len(self.prompts))
            for j in range(self.n)
        ]

    def _worker_request(self, i: int, j: int) -> GenerateRequest:
        sampling = self.sampling[i]
        seed = randbits(64) if sampling.seed is None else (sampling.seed + j) % 2**64
        request_id = f"{self.job_id}-{i * self.n + j}"
        return GenerateRequest(
            request_id,
            self.prompts[i],
            replace(sampling, seed=seed),
            self.terms.priority,
            self.terms.cache_salt,
            self.grammar,
        )
