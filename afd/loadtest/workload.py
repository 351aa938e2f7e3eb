"""What is sent: prompts and how long their answers shall be. Pure; each workload is a function of its seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from afd.errors import ConfigError

Endpoint = Literal["chat", "completions"]
Prompt = str | list[int]  # text, or token ids

# Token ids below this are the special ones of most vocabularies; real ones hold the whole range above.
_FIRST_ID, DEFAULT_VOCAB = 256, 10_000
# Words that most vocabularies hold as one token, with the space before them.
_TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city name team minute idea body back"
)
_WORDS = tuple(_TEXT.split())


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to be: `output_tokens` is what the answer may have (max_tokens); `at_s` when a trace sends it."""

    prompt: Prompt
    input_tokens: int  # as far as known; the server's own count replaces it
    output_tokens: int
    at_s: float | None = None


@dataclass(frozen=True, slots=True)
class Lengths:
    """A number of tokens, drawn evenly from `least` … `most`."""

    least: int
    most: int

    @staticmethod
    def parse(text: str, flag: str) -> Lengths:
        """`128` or `64:256`. Raises ConfigError naming `flag`."""
        try:
            bounds = [int(part) for part in text.split(":")]
        except ValueError:
            bounds = []
        if not (1 <= len(bounds) <= 2 and 1 <= bounds[0] <= bounds[-1] <= 10_000_000):
            raise ConfigError(f"{flag} is {text!r}; it is a number of tokens like 128, or MIN:MAX like 64:256")
        return Lengths(bounds[0], bounds[-1])

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.least, self.most)


class Writer:
    """Makes up prompts of a given length: token ids for completions, words for chat (of one token each, about)."""

    def __init__(self, endpoint: Endpoint, vocab: int) -> None:
        """Ids lie below `vocab`."""
        if vocab < 2:
            raise ConfigError(f"--vocab is {vocab}; token ids of random prompts lie below it, so it must be 2 or more")
        self._ids = range(_FIRST_ID if vocab > 2 * _FIRST_ID else 1, vocab)
        self._words = endpoint == "chat"

    def write(self, tokens: int, rng: random.Random, start: Prompt | None = None) -> Prompt:
        """A prompt of `tokens` random tokens, behind `start` (one that this writer wrote)."""
        if self._words:
            words = " ".join(rng.choices(_WORDS, k=tokens))
            return f"{start} {words}" if start else words
        ids = rng.choices(self._ids, k=tokens)
        return [*start, *ids] if isinstance(start, list) else ids


def random_lengths(writer: Writer, inputs: Lengths, outputs: Lengths, seed: int) -> Iterator[Ask]:
    """Random prompts, for ever."""
    rng = random.Random(seed)
    while True:
        tokens = inputs.draw(rng)
        yield Ask(writer.write(tokens, rng), tokens, outputs.draw(rng))


def shared_prefixes(
    writer: Writer, prefix_tokens: int, prefixes: int, inputs: Lengths, outputs: Lengths, seed: int
) -> Iterator[Ask]:
    """Each prompt is one of `prefixes` beginnings of `prefix_tokens` tokens and a tail of its own of `inputs` tokens;
    for ever. Raises ConfigError."""
    if prefix_tokens < 1 or prefixes < 1:
        raise ConfigError(
            f"--prefix-tokens is {prefix_tokens} and --prefixes is {prefixes}; both must be 1 or more for --data prefix"
        )
    rng = random.Random(seed)
    starts = [writer.write(prefix_tokens, rng) for _ in range(prefixes)]
    return _tails(writer, starts, prefix_tokens, inputs, outputs, rng)


def _tails(
    writer: Writer, starts: list[Prompt], prefix_tokens: int, inputs: Lengths, outputs: Lengths, rng: random.Random
) -> Iterator[Ask]:
    while True:
        tokens = inputs.draw(rng)
        prompt = writer.write(tokens, rng, rng.choice(starts))
        yield Ask(prompt, prefix_tokens + tokens, outputs.draw(rng))
