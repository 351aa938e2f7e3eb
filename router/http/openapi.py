"""OpenAPI document (/openapi.json). Bodies are read by hand (router.openai.bodies); what they are is said here."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from router.http.front_door import OPEN_PATHS
from router.openai.fields import MAX_BIASES
from router.openai.schema import MAX_STOPS, ChatRequest, CompletionRequest
from router.openai.tokenization import Detokenize, TokenizeChat, TokenizePrompt
from router.telemetry.debug import MAX_SECONDS, MIN_SECONDS

Schema = dict[str, Any]

_BODIES = {
    "/v1/chat/completions": (ChatRequest,),
    "/v1/completions": (CompletionRequest,),
    "/tokenize": (TokenizePrompt, TokenizeChat),
    "/detokenize": (Detokenize,),
}
_QUERIES: dict[str, list[Schema]] = {
    "/debug/timeline": [
        {
            "name": "seconds",
            "in": "query",
            "schema": {"type": "number", "minimum": MIN_SECONDS, "maximum": MAX_SECONDS},
        },
        {"name": "format", "in": "query", "schema": {"type": "string", "enum": ["trace", "summary"]}},
    ]
}
_STREAMED = ("/v1/chat/completions", "/v1/completions")
_TEXTS: Schema = {"type": "string", "minLength": 1}
_TOKENS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_NULL: Schema = {"type": "null"}
# What a field may also be in JSON, before it becomes what the models have.
_WIDER: dict[tuple[str, str], Schema] = {
    ("CompletionRequest", "prompt"): {
        "anyOf": [
            _TEXTS,
            {"type": "array", "items": _TEXTS, "minItems": 1},
            _TOKENS,
            {"type": "array", "items": _TOKENS, "minItems": 1},
        ]
    },
    ("Message", "content"): {
        "anyOf": [
            {"type": "string"},
            {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                    "required": ["type", "text"],
                },
            },
        ]
    },
}
_STOP: Schema = {"anyOf": [_TEXTS, {"type": "array", "items": _TEXTS, "maxItems": MAX_STOPS}, _NULL]}
_BIAS: Schema = {
    "type": "object",
    "description": "By token id, what is added to its logit.",
    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    "maxProperties": MAX_BIASES,
}
_WIDER |= {(name, "stop"): _STOP for name in ("ChatRequest", "CompletionRequest")}
_WIDER |= {(name, "logit_bias"): {"anyOf": [_BIAS, _NULL]} for name in ("ChatRequest", "CompletionRequest")}


def _object(**properties: Schema) -> Schema:
    """An object that has all of these, and may have more."""
    return {"type": "object", "required": list(properties), "properties": properties}


_INTEGER: Schema = {"type": "integer"}
_STRING: Schema = {"type": "string"}
_USAGE = _object(prompt_tokens=_INTEGER, completion_tokens=_INTEGER, total_tokens=_INTEGER)
_REASON: Schema = {"enum": ["stop", "length", "tool_calls"]}
_PERHAPS: Schema = {"type": ["string", "null"]}
_ERROR = _object(error=_object(message=_STRING, type=_STRING, param=_PERHAPS, code=_PERHAPS))
_HEAD: dict[str, Schema] = {"id": _STRING, "created": _INTEGER, "model": _STRING, "usage": _USAGE}
_CHAT_CHOICE = _object(index=_INTEGER, message=_object(role={"const": "assistant"}), finish_reason=_REASON)
_COMPLETION_CHOICE = _object(index=_INTEGER, text=_STRING, finish_reason=_REASON)
_IDS: Schema = {"type": "array", "items": _INTEGER}
_ANSWERS = {
    "/v1/chat/completions": _object(
        object={"const": "chat.completion"}, choices={"type": "array", "items": _CHAT_CHOICE}, **_HEAD
    ),
    "/v1/completions": _object(
        object={"const": "text_completion"}, choices={"type": "array", "items": _COMPLETION_CHOICE}, **_HEAD
    ),
    "/tokenize": _object(count=_INTEGER, max_model_len=_INTEGER, tokens=_IDS),
    "/detokenize": _object(prompt=_STRING),
    "/version": _object(version=_STRING),
    "/v1/models": _object(object={"const": "list"}, data={"type": "array"}),
}
_REFUSALS = {
    "400": "The request cannot be served; `param` names the field at fault.",
    "401": "The server wants an API key (Authorization: Bearer KEY).",
    "404": "There is no such model here.",
    "413": "The body is too long.",
    "429": "Too many requests wait already; Retry-After says when to come again.",
    "503": "No worker can take the request now.",
    "504": "The request's time ran out (timeout).",
}


def describe(app: FastAPI, model: str, *, keyed: bool) -> None:
    """Gives `app` its document, which is made when it is first asked for. `model`: the one served; `keyed`: clients
    need an API key."""

    def document() -> Schema:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            app.openapi_schema = _completed(made, model, keyed)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _completed(made: Schema, model: str, keyed: bool) -> Schema:
    components = made.setdefault("components", {})
    components["schemas"] = {"Error": _ERROR, **_bodies(model)}
    if keyed:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in made["paths"].items():
        for operation in operations.values():
            _complete(operation, path)
            if keyed and path not in OPEN_PATHS:
                operation["security"] = [{"key": []}]
    return made


def _complete(operation: Schema, path: str) -> None:
    """Says what an operation takes and gives."""
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    answers = operation["responses"]
    answers.pop("422", None)  # the framework's own; there are no bodies that it checks
    for status, text in _REFUSALS.items():
        answers.setdefault(status, {"description": text, "content": error})
    if path in _ANSWERS:
        answers["200"]["content"] = {"application/json": {"schema": _ANSWERS[path]}}
    if path == "/metrics":
        answers["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    if path in _QUERIES:
        operation["parameters"] = _QUERIES[path]
    if path in _STREAMED:
        answers["200"]["content"]["text/event-stream"] = {}  # chunks; OpenAPI has no words for them
    if path in _BODIES:
        kinds = [{"$ref": f"#/components/schemas/{kind.__name__}"} for kind in _BODIES[path]]
        schema = kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}


def _bodies(model: str) -> dict[str, Schema]:
    kinds = [(kind, "validation") for some in _BODIES.values() for kind in some]
    _, made = models_json_schema(kinds, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    schemas: dict[str, Schema] = made["$defs"]
    for (name, field), wider in _WIDER.items():
        schemas[name]["properties"][field] = wider
    for name in ("ChatRequest", "CompletionRequest"):
        schemas[name]["properties"]["model"] = {"type": "string", "enum": [model]}
    for name in ("TokenizePrompt", "TokenizeChat", "Detokenize"):
        schemas[name]["properties"]["model"] = {"enum": [model, None]}
    return schemas
