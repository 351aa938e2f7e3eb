"""POST /tokenize and /detokenize, as vLLM has them: what the model's tokenizer makes of a prompt, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from router.openai.bodies import json_object, reading, validate
from router.openai.fields import TokenId
from router.openai.responses import Json
from router.openai.schema import ChatPrompt
from router.relay.jobs import Jobs
from router.text.tokenizer import off_loop

_CHARS_PER_TOKEN = 8  # more than most have; only says whether decoding is work for another thread


class _Tokenize(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    model: str | None = None
    return_token_strs: bool | None = None


class TokenizePrompt(_Tokenize):
    """The body of POST /tokenize with a text."""

    prompt: str
    add_special_tokens: bool | None = None


class TokenizeChat(_Tokenize, ChatPrompt):
    """The body of POST /tokenize with messages."""


class Detokenize(BaseModel):
    """The body of POST /detokenize."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True, max_length=1 << 21)]


def _read(raw: bytes) -> TokenizePrompt | TokenizeChat:
    fields = json_object(raw)
    return validate(TokenizeChat, fields) if "messages" in fields else validate(TokenizePrompt, fields)


class Tokenization:
    """`check_model` raises RequestError for a model that is not served here."""

    def __init__(self, jobs: Jobs, check_model: Callable[[str], None]) -> None:
        self._jobs = jobs
        self._check_model = check_model

    async def tokenize(self, raw: bytes) -> Json:
        """Raises RequestError."""
        body = await reading(lambda: _read(raw), raw)
        if isinstance(body, TokenizeChat):
            _, ids = await self._jobs.chat_prompt(body, len(raw))
        else:
            prompt, special = body.prompt, body.add_special_tokens is not False
            ids = await self._jobs.text(prompt, len(raw), special=special)
        if body.model is not None:
            self._check_model(body.model)
        wants_strings = bool(body.return_token_strs)
        strings = await off_loop(
            lambda: [self._jobs.tokenizer.piece(i) for i in ids] if wants_strings else None, len(raw)
        )
        return {
            "count": len(ids),
            "max_model_len": self._jobs.max_context,
            "tokens": ids,
            "token_strs": strings,
        }

    async def detokenize(self, raw: bytes) -> Json:
        """Raises RequestError."""
        body = await reading(lambda: validate(Detokenize, json_object(raw)), raw)
        if body.model is not None:
            self._check_model(body.model)
        self._jobs.check_vocabulary(body.tokens, "tokens")
        num_chars = len(body.tokens) * _CHARS_PER_TOKEN
        text = await off_loop(lambda: self._jobs.tokenizer.decode(body.tokens, special=True), num_chars)
        return {"prompt": text}
