"""Chooses the next token of each row of logits. Rows do not influence one another.

Order of treatment (as vLLM's): grammar, masks and biases, penalties, minimum length, temperature, then min_p, top_k and
top_p filters. The draw for a token is a pure function of (seed, position), so a request gives the same text after
preemption, in another batch, or on another worker. Log-probabilities are of the model's own distribution, before any
treatment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from afd.native.packed import best_columns
from afd.types import SampledToken, SamplingParams
from attention_worker import bias
from attention_worker.grammar import Matcher
from attention_worker.sequence import Sequence


class Sampler:
    """`eos_token_ids` are what min_tokens holds back."""

    def __init__(self, eos_token_ids: tuple[int, ...]) -> None:
        self.eos_token_ids = eos_token_ids

    def sample(self, logits: Tensor, sequences: Seq[Sequence]) -> list[SampledToken]:
        """logits [rows, vocab] float32, one row a sequence -> one token a sequence. `logits` may be changed."""
        if not sequences:
            return []
        wants = [s.request.sampling.logprobs for s in sequences]
        raw = torch.log_softmax(logits, dim=-1) if any(w is not None for w in wants) else None
        for row, sequence in enumerate(sequences):
            if sequence.matcher is not None:
                _constrain(logits[row], sequence.matcher)
            bias.apply(logits[row], sequence)
            if sequence.matcher is not None and logits[row].max() == -torch.inf:
                sequence.matcher.fail("allowed_token_ids and bad_words leave no token that the grammar allows")
            self._penalise(logits[row], sequence)
        chosen = self._choose(logits, sequences)
        if raw is None:
            return [SampledToken(token_id) for token_id in chosen]
        return [
            _with_logprobs(raw[row], token_id, want)
            for row, (token_id, want) in enumerate(zip(chosen, wants, strict=True))
        ]

    def score(self, logits: Tensor, sequence: Sequence) -> None:
        """Takes the logits [rows, vocab] float32 that the prompt's next unscored tokens came from."""
        raw = torch.log_softmax(logits, dim=-1)
        want = sequence.request.sampling.logprobs
        first = len(sequence.scored)
        for row, token_id in zip(raw, sequence.token_ids[first : first + len(raw)], strict=True):
            sequence.scored.append(_with_logprobs(row, token_id, want))

    def _penalise(self, row: Tensor, sequence: Sequence) -> None:
        """Changes one row [vocab] in place; touches nothing when the request asks for no penalty."""
        sampling = sequence.request.sampling
        generated = sequence.token_ids[len(sequence.request.prompt_token_ids) :]
        if sampling.repetition_penalty != 1.0:
            ids = torch.tensor(sorted(set(sequence.token_ids)), device=row.device)
            values = row[ids]
            row[ids] = torch.where(
                values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty
            )
        if generated and (sampling.frequency_penalty or sampling.presence_penalty):
            counts = Counter(generated)
            ids = torch.tensor(list(counts), device=row.device)
            times = torch.tensor(list(counts.values()), device=row.device)
            row[ids] -= sampling.frequency_penalty * times + sampling.presence_penalty
        if sequence.num_generated < sampling.min_tokens:
            held_back = [*sampling.stop_token_ids, *(() if sampling.ignore_eos else self.eos_token_ids)]
            if held_back:
                values = row[held_back]
                row[held_back] = -torch.inf
                if sequence.matcher is not None and row.max() == -torch.inf:
                    row[held_back] = values  # the grammar allows nothing else

    def _choose(self, logits: Tensor, sequences: Seq[Sequence]) -> list[int]:
        best = best_columns(logits).tolist()
        drawn = [row for row, s in enumerate(sequences) if s.request.sampling.temperature > 0]
        # A draw walks the vocabulary in index order, or by probability when ranks matter. Which of the two must depend
        # on the row's own request, not on its neighbours'.
        ranked = [row for row in drawn if _needs_ranks(sequences[row].request.sampling)]
        for rows, sort in ((ranked, True), ([row for row in drawn if row not in ranked], False)):
            if rows:
                for row, token_id in zip(rows, _draw(logits[rows], [sequences[r] for r in rows], sort), strict=True):
                    best[row] = token_id
        return list(best)


def _constrain(row: Tensor, matcher: Matcher) -> None:
    """Changes one row [vocab] in place; nothing when the grammar has a problem, which ends the request."""
    allowed = matcher.allowed()  # [vocab], rounded up to whole words
    if not matcher.problem:
        row.masked_fill_(torch.from_numpy(~allowed[: len(row)]).to(row.device), -torch.inf)


def uniform(seed: int, position: int) -> float:
    """The draw in [0, 1) for the token at `position`: a counter-based generator (Philox), so it needs no state."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def _needs_ranks(sampling: SamplingParams) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1


def _draw(logits: Tensor, sequences: Seq[Sequence], sort: bool) -> list[int]:
    """Samples one token id a row of [rows, vocab] by inverting the cumulative distribution at `uniform`."""
    params = [s.request.sampling for s in sequences]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device).unsqueeze(1)

    probs = torch.softmax(logits / column([max(p.temperature, 1e-5) for p in params]), dim=-1)
    order: Tensor | None = None
    if sort:
        probs, order = probs.sort(dim=-1, descending=True, stable=True)
    if any(p.min_p for p in params):
        probs = probs.masked_fill(probs < probs.amax(dim=-1, keepdim=True) * column([p.min_p for p in params]), 0.0)
    if order is not None:
        vocab = probs.shape[-1]
        ranks = torch.arange(vocab, device=probs.device)
        probs = probs.masked_fill(ranks >= column([float(p.top_k or vocab) for p in params]), 0.0)
        # A token stays while the mass before it is short of top_p, so the best one always does.
        mass = probs.cumsum(dim=-1)
        probs = probs.masked_fill(mass - probs >= column([p.top_p for p in params]) * mass[:, -1:], 0.0)
    mass = probs.cumsum(dim=-1)
    draws = column([uniform(s.seed, len(s.token_ids)) for s in sequences])
    # The first index whose cumulative mass exceeds the draw; never one whose own mass is zero.
    index = torch.searchsorted(mass, draws * mass[:, -1:], right=True)
    last = probs.shape[-1] - 1 - (probs > 0).flip(-1).to(torch.uint8).argmax(dim=-1, keepdim=True)
    index = torch.minimum(index, last)
    if order is not None:
        index = order.gather(1, index)
    return [int(i) for i in index.squeeze(1).tolist()]


def _with_logprobs(row: Tensor, token_id: int, want: int | None) -> SampledToken:
    if want is None:
        return SampledToken(token_id)
    values, ids = row.topk(min(want, row.shape[0]))
    top = tuple((int(i), float(v)) for i, v in zip(ids.tolist(), values.tolist(), strict=True))
    return SampledToken(token_id, float(row[token_id]), top)
