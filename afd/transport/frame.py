"""One frame: a fixed, versioned, typed header with its tensors right behind it. No pickles, no string dtypes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor


class FrameKind(IntEnum):
    """What a frame is; the number is on the wire."""

    DISPATCH = 1
    COMBINE = 2
    ERROR = 3


@dataclass(frozen=True, slots=True)
class Frame:
    """A dispatch (attention → FFN), or the combine or error that answers it (FFN → attention).

    The answer repeats the dispatch's identity: epoch, ranks, microbatch, step, layer, sequence. `sequence` counts the
    dispatches of one link from 0. hidden is y or the partial sum, [num_tokens, hidden] in the link's dtype; None in a
    combine that adds nothing. expert_ids [num_tokens, top_k] int32 and expert_weights float32 come with dispatches of
    MoE layers. `message` is an error's sentence.
    """

    kind: FrameKind
    epoch: int
    attention_rank: int
    ffn_rank: int
    microbatch: int
    step: int
    layer: int
    sequence: int
    num_tokens: int
    hidden: Tensor | None = None
    expert_ids: Tensor | None = None
    expert_weights: Tensor | None = None
    message: str = ""
