"""Bodies of requests, read and checked: JSON in, the values of router.openai.schema out, or a sentence.

A field is understood, is one of IGNORED (says nothing about the answer), or is known and not implemented: then it may
hold only a value that means "off" (OFF_VALUES) and is refused by name otherwise. Fields that nobody knows are dropped,
as vLLM does, with a line in the debug log.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from afd.errors import RequestError
from router.openai.fields import read_json, shown
from router.openai.schema import MAX_CHOICES, ChatRequest, CompletionRequest, Request

log = logging.getLogger(__name__)

READ_HERE_BYTES = 64 << 10  # a longer body is read on another thread
_READING = ThreadPoolExecutor(2, "reads bodies")

IGNORED = frozenset(
    {
        "include_reasoning",
        "metadata",
        "parallel_tool_calls",
        "request_id",
        "safety_identifier",
        "service_tier",
        "spaces_between_special_tokens",  # tokenizer.json decides it
        "store",
    }
)
# Fields that this server, or one of its endpoints, does not implement, and the values of them that ask for nothing.
OFF_VALUES: dict[str, tuple[object, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "chat_template": (None,),
    "continue_final_message": (None, False),
    "documents": (None, []),
    "echo": (None, False),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "kv_transfer_params": (None,),
    "length_penalty": (None, 1),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "prompt_embeds": (None,),
    "prompt_logprobs": (None,),
    "reasoning_effort": (None,),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "use_beam_search": (None, False),
    "verbosity": (None,),
    "web_search_options": (None,),
}

R = TypeVar("R", ChatRequest, CompletionRequest)
B = TypeVar("B", bound=BaseModel)
T = TypeVar("T")


def parse(kind: type[R], raw: bytes) -> R:
    """Reads a request body; `reading` says where to. Raises RequestError naming the field at fault."""
    request = validate(kind, _implemented(json_object(raw), kind))
    _check_together(request)
    return request


async def reading(read: Callable[[], T], raw: bytes) -> T:
    """`read()`, which reads `raw`: here if it is short, else on another thread, so that streams keep flowing. Few at a
    time, since every thread that computes keeps the event loop waiting for its turn."""
    if len(raw) <= READ_HERE_BYTES:
        return read()
    return await asyncio.get_running_loop().run_in_executor(_READING, read)


def json_object(raw: bytes) -> dict[str, object]:
    """Raises RequestError for a body that is no JSON object."""
    try:
        data = read_json(raw)
    except ValueError as error:
        raise RequestError(f"the request body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(data, dict):
        raise RequestError(f"the request body is a JSON {type(data).__name__}, not an object", code="invalid_json")
    return data


def validate(kind: type[B], fields: Mapping[str, object]) -> B:
    """Raises RequestError naming the field at fault."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _explain(error) from error


def _implemented(data: Mapping[str, object], kind: type[Request]) -> dict[str, object]:
    """`data` without fields that ask for nothing. Raises RequestError for what this server does not implement."""
    fields = {}
    for name, value in data.items():
        if name in OFF_VALUES and name not in kind.model_fields:
            if value not in OFF_VALUES[name] and not (name == "best_of" and value == data.get("n")):
                raise RequestError(f"{name} is not supported by this server", param=name, code="unsupported_parameter")
        elif name in kind.model_fields:
            fields[name] = value
        elif name not in IGNORED:
            log.debug("ignored the unknown request field %.80r", name)
    messages = fields.get("messages")
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        for name in ("function_call", "audio"):
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
    if isinstance(request, ChatRequest):
        request.check_choice()
    if isinstance(request, ChatRequest) and request.top_logprobs and not request.logprobs:
        raise RequestError("top_logprobs is only for requests with logprobs: true", param="top_logprobs")
    num_prompts, n = 1, request.n or 1
    if isinstance(request, CompletionRequest):
        _check_completion(request)
        num_prompts, n = len(request.prompt), max(n, request.best_of or 1)
    if (num_choices := num_prompts * n) > MAX_CHOICES:
        raise RequestError(
            f"prompt holds {num_prompts} prompts and n or best_of is {n}: {num_choices} choices, but one request may "
            f"ask for {MAX_CHOICES} at most; send several requests",
            param="prompt",
            code="too_many_choices",
        )
    limit = request.token_limit
    if limit is not None and (request.min_tokens or 0) > limit:
        raise RequestError(f"min_tokens is {request.min_tokens} but the answer may have {limit}", param="min_tokens")


def _check_completion(request: CompletionRequest) -> None:
    n, best_of = request.n or 1, request.best_of
    if best_of is not None and best_of < n:
        raise RequestError(f"best_of is {best_of}, but must be at least n, which is {n}", param="best_of")
    if best_of is not None and best_of > n and request.stream:
        raise RequestError("best_of above n is only for requests that are not streamed", param="best_of")


def _explain(error: ValidationError) -> RequestError:
    """The first thing wrong, as a sentence."""
    item = error.errors(include_url=False)[0]  # there are few: long lists end with their first (fail_fast)
    place = ""
    for part in item["loc"]:
        place += f"[{part}]" if isinstance(part, int) else f".{part:.80}" if place else f"{part:.80}"
    if item["type"] == "missing":
        return RequestError(f"{place} is missing", param=place, code="missing_required_parameter")
    value = shown(item["input"])
    problem = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return RequestError(f"{place} is {value}: {problem[:1].lower()}{problem[1:]}", param=place, code="invalid_value")
