"""What a grammar of llguidance may be, and may cost: the same on both ends, so that what the router lets through an
attention worker takes. Knows no tokenizer, no tensors.

The library counts its own work and gives up at a limit, while it reads a grammar and at every token, so a hostile
grammar ends in an error in bounded time: about 0.2 s to read one, and 10 ms for a token, at the limits below.
"""

from __future__ import annotations

from functools import lru_cache

from llguidance import LLMatcher, LLParserLimits

MAX_BYTES = 128 << 10
_MAX_LEXER_STATES = 50_000  # one takes 1 to 2 KB


def limits() -> LLParserLimits:
    """The limits to read and follow a grammar with."""
    return LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)


def problem(grammar: str) -> str:
    """What is wrong with `grammar`, in one line; "" when it can be followed. May take a while: call it off an event
    loop."""
    size = len(grammar.encode())
    if size > MAX_BYTES:
        return f"it takes {size} bytes as a grammar, and {MAX_BYTES} are the limit"
    return _judged(grammar)


@lru_cache(128)
def _judged(grammar: str) -> str:
    return in_one_line(LLMatcher.validate_grammar(grammar, limits=limits()))


def in_one_line(message: str) -> str:
    """What llguidance says, without the part that it leaves out, and at most 300 characters of it."""
    line = " ".join(message.replace("<non-verbose/>", "").split())
    return line if len(line) <= 300 else f"{line[:297]}..."
