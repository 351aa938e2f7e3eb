"""Text to token ids and back, with the `tokenizers` library. Knows files and text, nothing of requests."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import tokenizers

from afd.errors import CheckpointError

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BLOCKING_CHARS = 4096  # about 2 ms of encoding; longer text is encoded on another thread
_UNFINISHED = "\ufffd"  # what a decoder shows for bytes that are not (yet) a character

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
        self._byte_level = '"ByteLevel"' in json.dumps(json.loads(text).get("decoder"))
        self._bytes: dict[int, bytes] = {}
        self._added = self._tokenizer.get_added_tokens_decoder()

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of `text`. `special` adds what the model wants around every text (BOS and the like); special
        tokens written out in the text are recognised either way."""
        return self._tokenizer.encode(text, add_special_tokens=special).ids

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """Text, without special tokens unless `special`; U+FFFD stands for bytes that are no character."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=not special)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for, special tokens by their name; b"" for an id the tokenizer does not have."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

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


class Detokenizer:
    """Text of one answer while its tokens arrive: the pieces joined are what decoding all tokens at once would give.

    A character whose bytes are spread over tokens comes out with the last of them; only `flush`, at the end, shows
    U+FFFD for bytes that never became one. The window decoded for a token starts a few tokens back, where earlier
    text ended on a whole character, because decoders join tokens by their neighbours (spaces at word starts).
    """

    _PROMPT_TAIL = 4  # tokens of the prompt that give the first token its neighbour
    _PATIENCE = 16  # tokens without a whole character (one has at most 4 bytes) are damaged for good

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], *, special: bool = False) -> None:
        """`special`: special tokens are text too."""
        self._decode = partial(tokenizer.decode, special=special)
        self._window = list(prompt_token_ids[-self._PROMPT_TAIL :])
        self._shown = len(self._decode(self._window).rstrip(_UNFINISHED))  # characters of the window given out
        self._fresh = 0  # tokens at the end of the window that were not there when it started

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; "" for a part of a character, or a special token that is no text."""
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
        """What is left when no more tokens come."""
        return self._decode(self._window)[self._shown :]


async def off_loop(work: Callable[[], T], num_chars: int) -> T:
    """Runs `work` here when `num_chars` of text make it short, else on another thread, so that streams keep flowing."""
    if num_chars <= _BLOCKING_CHARS:
        return work()
    return await asyncio.get_running_loop().run_in_executor(None, work)
