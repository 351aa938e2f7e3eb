"""What every candidate is asked, and how its speed is reckoned: one definition for all of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

VOCAB_FROM, VOCAB_TO = 100, 40000
WARM_PROMPT = 16  # prompt tokens of the unmeasured run that wakes a candidate up

Prompts = Sequence[Sequence[int]]


class BenchError(Exception):
    """A candidate cannot be started or measured; the text is a sentence that says why."""


@dataclass(frozen=True)
class Run:
    """All prompts generated for, in `seconds`. `arrivals`: for each stream its tokens' times in seconds of one clock;
    empty for a candidate that gives all tokens at once."""

    seconds: float
    arrivals: list[list[float]] = field(default_factory=list)


class Candidate(Protocol):
    """Something that generates. One caller at a time, and only during the candidate's turn (decode.turns)."""

    @property
    def name(self) -> str: ...

    def pids(self) -> list[int]:
        """Its processes, which may have children."""

    def run(self, prompts: Prompts, tokens: int) -> Run:
        """Generates exactly `tokens` tokens, greedily, for each of `prompts` at the same time. Raises BenchError."""


class Watched(Candidate, Protocol):
    """A candidate with a timeline."""

    def watch(self, prompts: Prompts, tokens: int) -> dict[str, object]:
        """Generates as `run` does, and meanwhile asks what the workers did while all streams decoded: a
        pipeline.summary.Summary as JSON knows it."""


Opening = AbstractContextManager[Candidate]


@dataclass(frozen=True)
class Turn:
    """One candidate's figures of one round, at one number of streams; all in tokens per second.

    `decode` is None when the longer run took no longer than the short one: the machine was too noisy. `steady` is None
    when the streams did not overlap, or came without times.
    """

    decode: float | None
    prefill: float
    steady: float | None


def random_prompts(count: int, length: int, vocab: int) -> list[list[int]]:
    """The same for the same arguments, in every round and for every candidate."""
    rng = random.Random(0)
    return [[rng.randrange(VOCAB_FROM, min(VOCAB_TO, vocab)) for _ in range(length)] for _ in range(count)]


def measure(candidate: Candidate, prompts: Prompts, tokens: int, warmup: int) -> Turn:
    """A run of one token, which is the prefill, and one of `tokens` more; before both, one of `warmup` tokens that does
    not count. Decode is the difference between the two. Raises BenchError."""
    if warmup:
        candidate.run([prompt[:WARM_PROMPT] for prompt in prompts], warmup)
    first, full = candidate.run(prompts, 1), candidate.run(prompts, tokens + 1)
    decoding_s = full.seconds - first.seconds
    return Turn(
        decode=tokens * len(prompts) / decoding_s if decoding_s > 0 else None,
        prefill=sum(map(len, prompts)) / first.seconds,
        steady=steady_rate(full.arrivals),
    )


def steady_rate(arrivals: list[list[float]]) -> float | None:
    """Tokens per second between the last stream's first token and the first stream's last one; None when the streams
    did not overlap, or came without times."""
    if not arrivals:
        return None
    begin, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    count = sum(begin < at <= end for times in arrivals for at in times)
    return count / (end - begin) if end > begin and count >= len(arrivals) else None
