"""The requests of the OpenAI API that this router understands, with vLLM's extensions. JSON in, checked values out.

Nothing is ignored silently: a field is understood, is one of IGNORED (says nothing about the answer), holds the value
that means "off" (OFF_VALUES), or is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from afd.errors import CheckpointError, RequestError
from afd.rpc.convert import check_sampling
from afd.types import SamplingParams

MAX_CHOICES = 128  # n
MAX_LOGPROBS = 20
MAX_STOPS = 16

IGNORED = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
)
# Fields of the API that this server does not implement, and the values of them that ask for nothing.
OFF_VALUES: dict[str, tuple[object, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": (None,),
    "web_search_options": (None,),
}

Prompt = list[str] | list[list[int]]


def _stops(value: object) -> object:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or a list of strings")
    if len(stops) > MAX_STOPS or not all(stops):
        raise ValueError(f"must hold at most {MAX_STOPS} strings, none of them empty")
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
            raise ValueError(f"holds a part of type {kind!r}; this server takes only parts of type 'text'")
        if not isinstance(part.get("text"), str):
            raise ValueError("holds a text part whose 'text' is not a string")
        texts.append(part["text"])
    return "\n".join(texts)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: bool | None = None


class Message(BaseModel):
    """One turn. Fields that answers carry and clients send back (refusal, annotations, …) are not looked at."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(_text)]
    name: str | None = None
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, object]:
        """As chat templates expect it; "developer" is the newer name of "system", which they know."""
        fields = self.model_dump(exclude_none=True)
        return fields | {"role": "system"} if self.role == "developer" else fields


class _Generation(_Body):
    """What both endpoints share."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Annotated[list[str], BeforeValidator(_stops)] = Field(default_factory=list)
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=2**32)]] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None

    @property
    def token_limit(self) -> int | None:
        """Tokens the client allows the answer; None: it does not say."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives wanted beside each token; None: no logprobs."""
        raise NotImplementedError

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(_Generation):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
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

    prompt: Annotated[Prompt, BeforeValidator(_prompt)]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


Request = ChatRequest | CompletionRequest
R = TypeVar("R", ChatRequest, CompletionRequest)


def parse(kind: type[R], raw: bytes) -> R:
    """Reads a request body. Raises RequestError naming the field at fault."""
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the request body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(data, dict):
        raise RequestError(f"the request body is a JSON {type(data).__name__}, not an object", code="invalid_json")
    try:
        request = kind.model_validate(_implemented(data, kind))
    except ValidationError as error:
        raise _explain(error) from error
    _check_together(request)
    return request


def _implemented(data: Mapping[str, object], kind: type[_Generation]) -> dict[str, object]:
    """`data` without fields that ask for nothing. Raises RequestError for what this server does not implement."""
    fields = {}
    for name, value in data.items():
        if name in OFF_VALUES and name not in kind.model_fields:
            if value not in OFF_VALUES[name] and not (name == "best_of" and value == data.get("n")):
                raise RequestError(f"{name} is not supported by this server", param=name, code="unsupported_parameter")
        elif name not in IGNORED:
            fields[name] = value
    messages = fields.get("messages")
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        for name in ("tool_calls", "function_call", "audio"):
            if isinstance(message, dict) and message.get(name):
                param = f"messages[{index}].{name}"
                raise RequestError(
                    f"{param} is not supported by this server", param=param, code="unsupported_parameter"
                )
    return fields


def _check_together(request: Request) -> None:
    """Rules over several fields."""
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options is only for requests with stream: true", param="stream_options")
    if isinstance(request, ChatRequest) and request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs is only for requests with logprobs: true", param="top_logprobs")
    limit = request.token_limit
    if limit is not None and (request.min_tokens or 0) > limit:
        raise RequestError(f"min_tokens is {request.min_tokens} but the answer may have {limit}", param="min_tokens")


def _explain(error: ValidationError) -> RequestError:
    """The first thing wrong, as a sentence."""
    item = error.errors(include_url=False)[0]
    place = ""
    for part in item["loc"]:
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)
    if item["type"] == "missing":
        return RequestError(f"{place} is missing", param=place, code="missing_required_parameter")
    if item["type"] == "extra_forbidden":
        return RequestError(f"unknown request field {place}", param=place, code="unknown_parameter")
    value = repr(item["input"])
    value = value if len(value) <= 60 else f"{value[:57]}..."
    problem = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return RequestError(f"{place} is {value}: {problem[:1].lower()}{problem[1:]}", param=place, code="invalid_value")


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What the model's generation_config.json says of sampling, for requests that do not."""

    values: SamplingParams

    @classmethod
    def read(cls, generation_config: Mapping[str, object]) -> SamplingDefaults:
        """Raises CheckpointError for a value that is not a number, or outside its range."""

        def number(name: str, default: float) -> float:
            value = generation_config.get(name)
            if value is None:
                return default
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise CheckpointError(f"{name} in generation_config is {value!r}, not a number")
            return value

        values = SamplingParams(
            temperature=number("temperature", 1.0),
            top_p=number("top_p", 1.0),
            top_k=max(0, int(number("top_k", 0))),
            min_p=number("min_p", 0.0),
            repetition_penalty=number("repetition_penalty", 1.0),
        )
        try:
            check_sampling(values)
        except RequestError as error:
            raise CheckpointError(f"generation_config: {error}") from error
        return cls(values)

    def sampling(self, request: Request, max_tokens: int) -> SamplingParams:
        """The parameters of `request` for an answer of at most `max_tokens` tokens."""
        return replace(
            self.values,
            max_tokens=max_tokens,
            min_tokens=min(request.min_tokens or 0, max_tokens),
            temperature=_given(request.temperature, self.values.temperature),
            top_p=_given(request.top_p, self.values.top_p),
            top_k=self.values.top_k if request.top_k is None else max(0, request.top_k),
            min_p=_given(request.min_p, self.values.min_p),
            seed=None if request.seed is None else request.seed % 2**64,
            repetition_penalty=_given(request.repetition_penalty, self.values.repetition_penalty),
            frequency_penalty=request.frequency_penalty or 0.0,
            presence_penalty=request.presence_penalty or 0.0,
            ignore_eos=bool(request.ignore_eos),
            stop_token_ids=tuple(request.stop_token_ids or ()),
            logprobs=request.num_logprobs,
        )


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
