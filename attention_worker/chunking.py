"""How many prompt tokens a step may carry while others decode. No tensors.

A prompt's chunk holds up the decodes beside it and behind it, on both sides. With a target for the time per output
token, the chunk shrinks when decode steps come out longer than that, and grows again while they have room.
"""

from __future__ import annotations

from dataclasses import dataclass

SMALLEST = 16  # tokens: a prompt always goes on
HEADROOM = 0.85  # of the target: below it chunks grow
GROWTH = 1.2


@dataclass
class ChunkBudget:
    """`most` tokens without a target (`target_s` None: seconds per output token) or while nobody decodes."""

    most: int
    target_s: float | None = None

    def __post_init__(self) -> None:
        self.tokens = self.most if self.target_s is None else min(self.most, 4 * SMALLEST)

    def allowed(self, decoding: bool) -> int:
        """Prompt tokens of the next step; `decoding`: some request waits for its next token meanwhile."""
        return self.tokens if decoding else self.most

    def observe(self, step_s: float, prompt_tokens: int) -> None:
        """A step with decodes took `step_s`, and the largest chunk on its way meanwhile had `prompt_tokens` tokens."""
        if self.target_s is None or prompt_tokens == 0:
            return
        if step_s > self.target_s:
            # What a step takes without any chunk is not known here: cut in proportion, at most to a half.
            self.tokens = max(SMALLEST, int(min(self.tokens, prompt_tokens) * max(0.5, self.target_s / step_s)))
        elif step_s < HEADROOM * self.target_s and prompt_tokens >= self.tokens:
            self.tokens = min(self.most, int(self.tokens * GROWTH) + 1)
