"""The requests of the OpenAI API that this router understands, with vLLM's extensions, as checked values."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    model_validator,
)

from router.answers.tools.fields import ToolCall, ToolFields
from router.openai.fields import AllowedIds, LogitBias, StopIds, shown
from router.openai.structured import Structured

MAX_N = 128
MAX_CHOICES = 1024  # prompts times n
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARS = 256
MAX_STOP_CHARS = 4096
MAX_MESSAGES = 1 << 14
MAX_PROMPT_IDS = 1 << 21  # in all prompts of a request together
_TIMEOUT = (
    "Seconds from when the request is sent to a worker, the wait in its queue included, to the end of the answer; then "
    "it ends with 504, or a stream with an error. Also the header X-Request-Timeout, where this is not given. The "
    "server's router.request_timeout_s is the most."
)

Prompt = list[str] | list[list[int]]


def _stops(value: object) -> object:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or a list of strings")
    if len(stops) > MAX_STOPS or not all(stops):
        raise ValueError(f"must hold at most {MAX_STOPS} strings, none of them empty")
    if any(len(stop) > MAX_STOP_CHARS for stop in stops):
        raise ValueError(f"must hold strings of at most {MAX_STOP_CHARS} characters")
    return stops


def _prompt(value: object) -> object:
    """Text, texts, token ids, or lists of token ids, as a list of prompts of one kind."""
    prompts = value if isinstance(value, list) else [value]
    if prompts is value and prompts and all(type(token) is int for token in prompts):
        prompts = [prompts]
    if not prompts or "" in prompts or [] in prompts:
        raise ValueError("must not be empty")
    if all(isinstance(prompt, str) for prompt in prompts):
        return prompts
    if all(isinstance(ids, list) and all(type(token) is int for token in ids) for ids in prompts):
        if (num_ids := sum(map(len, prompts))) > MAX_PROMPT_IDS:
            raise ValueError(f"must hold at most {MAX_PROMPT_IDS} token ids, and has {num_ids}")
        return prompts
    raise ValueError("must be a string, a list of strings, a list of token ids, or a list of lists of token ids")


def _text(value: object) -> object:
    """A message's content: text, or parts of type "text" (joined by line breaks)."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(f"holds a part of type {shown(kind)}; this server takes only parts of type 'text'")
        if not isinstance(part.get("text"), str):
            raise ValueError("holds a text part whose 'text' is not a string")
        texts.append(part["text"])
    return "\n".join(texts)


BadWords = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_CHARS)]],
    Field(fail_fast=True, max_length=MAX_BAD_WORDS),
]


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Message(BaseModel):
    """One turn. Fields that answers carry and clients send back (refusal, annotations, …) are not looked at. Where an
    assistant calls tools, content may be missing, and null is empty: so answers without a word come back."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(_text)]
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _calls_need_no_content(cls, data: object) -> object:
        if not isinstance(data, dict) or data.get("content") is not None:
            return data
        if data.get("tool_calls") or (data.get("role") == "assistant" and "content" in data):
            return {**data, "content": ""}
        return data

    def for_template(self) -> dict[str, object]:
        """As chat templates expect it; "developer" is the newer name of "system", which they know."""
        fields = self.model_dump(exclude_none=True)
        return fields | {"role": "system"} if self.role == "developer" else fields


class _Generation(_Body, Structured):
    """What both endpoints share."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_N)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Annotated[list[str], BeforeValidator(_stops)] = Field(default_factory=list)
    stop_token_ids: StopIds | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    logit_bias: LogitBias = None
    allowed_token_ids: AllowedIds | None = None
    bad_words: BadWords | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1)
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    # How the request is served (router.relay.terms).
    timeout: float | None = Field(None, gt=0, description=_TIMEOUT)
    priority: int | None = Field(None, ge=-(2**31), lt=2**31)
    user: str | None = None
    prompt_cache_key: str | None = None
    cache_salt: str | None = None

    @property
    def token_limit(self) -> int | None:
        """Tokens the client allows the answer; None: it does not say."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives wanted beside each token; None: no logprobs."""
        raise NotImplementedError

    @property
    def worker_logprobs(self) -> int | None:
        """The same, as the worker has to give them."""
        return self.num_logprobs

    @property
    def prompt_logprobs(self) -> bool:
        """Whether the prompt's tokens are to have logprobs too."""
        return False

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def usage_in_chunks(self) -> bool:
        return bool(self.include_usage and self.stream_options and self.stream_options.continuous_usage_stats)


class ChatPrompt(_Body, ToolFields):
    """Messages and tools, and how they become a prompt."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, object] | None = None


class ChatRequest(_Generation, ChatPrompt):
    """POST /v1/chat/completions."""

    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Generation):
    """POST /v1/completions."""

    prompt: Annotated[Prompt, PlainValidator(_prompt)]  # looks at all of it; once is enough
    add_special_tokens: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(None, ge=1, le=MAX_N)
    echo: bool | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def worker_logprobs(self) -> int | None:
        return 0 if self.logprobs is None and (self.best_of or 1) > (self.n or 1) else self.logprobs

    @property
    def prompt_logprobs(self) -> bool:
        return bool(self.echo) and self.logprobs is not None


Request = ChatRequest | CompletionRequest
