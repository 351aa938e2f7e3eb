"""best_of: of several answers to a prompt, the ones the model itself finds likeliest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from router.answers.choice import Delta
from router.relay.job import Job


def best(answers: Sequence[Delta], job: Job) -> Sequence[Delta]:
    """The job.num_kept answers of each prompt with the highest sum of logprobs, best first, numbered anew; all of them,
    as they are, where the job keeps all. `answers` are whole and in the order of their index."""
    if job.num_kept == job.n:
        return answers
    kept = []
    for prompt in range(len(job.prompts)):
        ranked = sorted(answers[prompt * job.n : (prompt + 1) * job.n], key=_logprob, reverse=True)
        kept += ranked[: job.num_kept]
    return [replace(answer, index=index) for index, answer in enumerate(kept)]


def _logprob(answer: Delta) -> float:
    """Of the whole answer, under the model."""
    return sum(token.logprob or 0.0 for token in answer.tokens)
