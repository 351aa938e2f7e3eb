"""What a request says of single tokens: which are allowed, which words are not, and what is added to whose logit."""

from __future__ import annotations

import torch
from torch import Tensor

from attention_worker.sequence import Sequence


def apply(row: Tensor, sequence: Sequence) -> None:
    """Changes one row of logits [vocab] in place; touches nothing when the request asks for nothing of the kind."""
    sampling = sequence.request.sampling
    if sampling.allowed_token_ids:
        allowed = torch.tensor(sampling.allowed_token_ids, device=row.device)
        kept = row[allowed]
        row.fill_(-torch.inf)
        row[allowed] = kept
    if sampling.bad_words:
        forbidden = [word[-1] for word in sampling.bad_words if _ends_with(sequence, word[:-1])]
        if forbidden:
            row[forbidden] = -torch.inf
    if sampling.logit_bias:
        ids, biases = zip(*sampling.logit_bias, strict=True)
        row[torch.tensor(ids, device=row.device)] += torch.tensor(biases, dtype=row.dtype, device=row.device)


def _ends_with(sequence: Sequence, beginning: tuple[int, ...]) -> bool:
    """Whether what is generated so far ends with `beginning`: all of a word but its last token."""
    start = len(sequence.token_ids) - len(beginning)
    return sequence.num_generated >= len(beginning) and tuple(sequence.token_ids[start:]) == beginning
