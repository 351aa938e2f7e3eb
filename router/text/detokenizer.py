"""Text of one answer while its tokens arrive: the pieces joined are what decoding all tokens at once would give.

A character whose bytes are spread over tokens comes out with the last of them. `WindowDetokenizer` works with any
tokenizer; `ByteDetokenizer`, which is many times cheaper, with those whose text is the bytes of the tokens in a row.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import partial
from typing import Protocol

from router.text.tokenizer import Tokenizer

_PROMPT_TAIL = 4  # tokens of the prompt that give the first token its neighbour
_UNFINISHED = "\ufffd"  # what a decoder shows for bytes that are not (yet) a character
_new_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer(Protocol):
    """Follows one answer. `push` its tokens in order, then `flush` once."""

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; "" for a part of a character, or a special token that is no text."""

    def flush(self) -> str:
        """What is left when no more tokens come: U+FFFD for bytes that never became a character."""


def detokenizer(tokenizer: Tokenizer, prompt_token_ids: Sequence[int], *, special: bool = False) -> Detokenizer:
    """The cheapest that fits `tokenizer`. `special`: special tokens are text too."""
    kind = ByteDetokenizer if tokenizer.joins_bytes else WindowDetokenizer
    return kind(tokenizer, prompt_token_ids, special=special)


def offsets(tokenizer: Tokenizer, token_ids: Sequence[int], text: str) -> list[int]:
    """How many characters of `text`, which `token_ids` spell, come before each of them. Special tokens count as text if
    `text` is what they spell with them."""
    for special in (True, False):
        decoder, length = detokenizer(tokenizer, (), special=special), 0
        starts, pieces = list[int](), list[str]()
        for token_id in token_ids:
            starts.append(length)
            pieces.append(decoder.push(token_id))
            length += len(pieces[-1])
        if "".join(pieces) + decoder.flush() == text:
            break
    return starts


class ByteDetokenizer:
    """For a tokenizer that joins bytes (Tokenizer.joins_bytes)."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], *, special: bool = False) -> None:
        self._texts = tokenizer.whole_texts(special=special)
        self._tokenizer = tokenizer
        self._special = special
        self._decoder = _new_utf8_decoder("replace")
        self._inside = False  # of a character, some bytes of which have come
        for token_id in prompt_token_ids[-_PROMPT_TAIL:]:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """See Detokenizer. A byte that can be part of no character shows as U+FFFD at once."""
        if not self._inside:
            text = self._texts.get(token_id)
            if text is not None:
                return text
        raw = self._tokenizer.text_bytes(token_id, special=self._special)
        text = self._decoder.decode(raw)
        self._inside = self._decoder.getstate()[0] != b""
        if not self._inside and text == raw.decode("utf-8", "replace") and _UNFINISHED not in text:
            self._texts[token_id] = text
        return text

    def flush(self) -> str:
        """See Detokenizer."""
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For any tokenizer. The window decoded for a token starts a few tokens back, where earlier text ended on a whole
    character, because decoders join tokens by their neighbours (spaces at word starts)."""

    _PATIENCE = 16  # tokens without a whole character (one has at most 4 bytes) are damaged for good

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], *, special: bool = False) -> None:
        self._decode = partial(tokenizer.decode, special=special)
        self._window = list(prompt_token_ids[-_PROMPT_TAIL:])
        self._shown = len(self._decode(self._window).rstrip(_UNFINISHED))  # characters of the window given out
        self._fresh = 0  # tokens at the end of the window that were not there when it started

    def push(self, token_id: int) -> str:
        """See Detokenizer. U+FFFD comes out when it is followed by a character, or lasts for many tokens."""
        self._window.append(token_id)
        self._fresh += 1
        text = self._decode(self._window)
        whole = text.rstrip(_UNFINISHED)
        if self._fresh >= self._PATIENCE:
            whole = text
        piece = whole[self._shown :]
        if (piece and len(whole) == len(text)) or self._fresh >= self._PATIENCE:
            self._window = self._window[-self._fresh :]
            self._shown = len(self._decode(self._window))
            self._fresh = 0
        else:
            self._shown += len(piece)
        return piece

    def flush(self) -> str:
        """See Detokenizer."""
        return self._decode(self._window)[self._shown :]
