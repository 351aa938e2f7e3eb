"""Text to token ids and back, with the `tokenizers` library. Knows files and text, nothing of requests."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from afd.errors import CheckpointError

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BLOCKING_CHARS = 4096  # about 2 ms of encoding; longer text is encoded on another thread

_NFC_SHRINKS = 3  # times, at most, that a text in UTF-8 gets shorter by it

T = TypeVar("T")


class Tokenizer:
    """A model's tokenizer.json. Immutable, so any thread may call it."""

    def __init__(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8")
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} is not a tokenizer this router can read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        decoder = json.loads(text).get("decoder") or {}
        self._byte_level = '"ByteLevel"' in json.dumps(decoder)
        self.joins_bytes = decoder.get("type") == "ByteLevel"  # text is text_bytes of the tokens in a row, as UTF-8
        self._bytes: dict[int, bytes] = {}
        self._whole_texts: dict[bool, dict[int, str]] = {True: {}, False: {}}
        self._added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = {str(token.content): i for i, token in self._added.items() if token.special}
        self._special = frozenset(self._special_ids)
        self.most_token_bytes = self._most_token_bytes(json.loads(text))

    def _most_token_bytes(self, config: dict[str, Any]) -> int | None:
        """The most bytes of a text that one token can stand for; None: no such number is known, since what is done to
        the text before may drop some of it, or since one unknown token stands for many characters."""
        normalizer = (config.get("normalizer") or {}).get("type")
        drops = '"Removed"' in json.dumps(config.get("pre_tokenizer"))
        strips = any(token.lstrip or token.rstrip for token in self._added.values())
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        whole = all(char in vocabulary for char in _BYTE_OF)
        if not self.joins_bytes or normalizer not in (None, "NFC") or drops or strips or not whole:
            return None
        return max(map(len, map(self.token_bytes, vocabulary.values()))) * (_NFC_SHRINKS if normalizer else 1)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of `text`. `special` adds what the model wants around every text (BOS and the like); special
        tokens written out in the text are recognised either way."""
        if len(text) <= _BLOCKING_CHARS:
            return self._tokenizer.encode(text, add_special_tokens=special).ids
        # Unlike the other, lets go of Python's lock.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """Text, without special tokens unless `special`; U+FFFD stands for bytes that are no character."""
        if len(token_ids) <= _BLOCKING_CHARS:
            return self._tokenizer.decode(token_ids, skip_special_tokens=not special)
        return self._tokenizer.decode_batch([token_ids], skip_special_tokens=not special)[0]

    def piece(self, token_id: int) -> str:
        """A token as the vocabulary has it; "" for an id the tokenizer does not have."""
        return self._tokenizer.id_to_token(token_id) or ""

    def spellings(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The token ids of each word as it begins a text, and, where a space before it makes others of them, those."""
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            bare, spaced = (tuple(self.encode(text, special=False)) for text in (word.lstrip(), " " + word.lstrip()))
            found |= {bare: None}
            if spaced[len(spaced) - len(bare) :] != bare:
                found |= {spaced: None}
        return tuple(ids for ids in found if ids)

    def special_id(self, text: str) -> int | None:
        """The special token that is written `text`; None: it is text like any other."""
        return self._special_ids.get(text)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for, special tokens by their name; b"" for an id the tokenizer does not have."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def text_bytes(self, token_id: int, *, special: bool) -> bytes:
        """What `decode` takes one token for, where joins_bytes: as the library's ByteLevel decoder has it, a token that
        holds any character outside the byte alphabet stands for itself."""
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None or (not special and piece in self._special):
            return b""
        if all(char in _BYTE_OF for char in piece):
            return b"".join([_BYTE_OF[char] for char in piece])
        return piece.encode()

    def whole_texts(self, *, special: bool) -> dict[int, str]:
        """A place to keep the texts of tokens that are whole characters by themselves, for all answers alike. Tokens
        are few enough to keep them all."""
        return self._whole_texts[special]

    def _find_bytes(self, token_id: int) -> bytes:
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return b""
        if token_id in self._added:
            return piece.encode()
        if self._byte_level:
            return b"".join(_BYTE_OF[char] if char in _BYTE_OF else char.encode() for char in piece)
        if match := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return piece.replace("\u2581", " ").encode()


def _byte_alphabet() -> dict[str, bytes]:
    """Byte-level BPE writes every byte as one printable character: printable Latin-1 as it is, the others, in order,
    as the characters from U+0100 on (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): bytes([byte]) for byte in printable}
    return table | {chr(0x100 + i): bytes([byte]) for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


async def off_loop(work: Callable[[], T], num_chars: int) -> T:
    """Runs `work` here when `num_chars` (or bytes) of text make it short, else on another thread, so that streams keep
    flowing."""
    if num_chars <= _BLOCKING_CHARS:
        return work()
    return await asyncio.get_running_loop().run_in_executor(None, work)
