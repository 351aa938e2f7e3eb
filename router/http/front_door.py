"""What stands before every route: request ids, API keys, CORS, and the one line of log that every request leaves."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable, Sequence
from hashlib import sha256

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.generation import SERVER_SEND
from router.http import errors, exchange
from router.http.exchange import Exchange

log = logging.getLogger("router.access")

# Needs no key: what probes and scrapers ask, and says nothing of requests. All else does.
OPEN_PATHS = frozenset({"/", "/health", "/ready", "/metrics", "/version"})


class FrontDoor:
    """An ASGI application around another. `on_end` is told of every request when it is over.

    It adds headers to the start of an answer only, and keeps the server's own `send` in the scope, for a Generation to
    use: the framework has a coroutine at each of its layers, for every chunk, and what they watch for, an exception
    once the answer has begun, does not come out of a Generation.
    """

    def __init__(
        self, app: ASGIApp, *, keys: Sequence[str], origins: Sequence[str], on_end: Callable[[Exchange], None]
    ) -> None:
        self._app = app
        self._on_end = on_end
        self._digests = [_digest(key) for key in keys]
        self._cors = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("X-Request-Id", "Retry-After"),
        )
        self._has_cors = bool(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        ours = exchange.begin(scope)
        answerer = self._answerer(scope, headers)
        extra = [(b"x-request-id", ours.request_id.encode()), *self._cors_headers(scope, headers)]

        async def start(message: Message) -> None:
            if message["type"] == "http.response.start":
                ours.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        scope[SERVER_SEND] = send
        try:
            await answerer(scope, receive, start)
        finally:
            log_end(ours)
            self._on_end(ours)

    def _answerer(self, scope: Scope, headers: Headers) -> ASGIApp:
        """Who answers: the application, if the request may come in."""
        if self._has_cors and _is_preflight(scope, headers):
            return self._cors.preflight_response(headers)
        if self._digests and scope["path"] not in OPEN_PATHS and not self._has_key(headers):
            return _unauthorised("authorization" in headers)
        return self._app

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip())
        # All are compared, and to their end: how long it takes says nothing of how close a guess was.
        matches = [hmac.compare_digest(given, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)

    def _cors_headers(self, scope: Scope, headers: Headers) -> list[tuple[bytes, bytes]]:
        """What lets a page read an answer, refusals included; the answer to a preflight has its own."""
        origin = headers.get("origin")
        if not self._has_cors or origin is None or _is_preflight(scope, headers):
            return []
        if not self._cors.is_allowed_origin(origin):
            return []
        allowed = {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
        return [(k.lower().encode(), v.encode("latin-1")) for k, v in (allowed | self._cors.simple_headers).items()]


def _is_preflight(scope: Scope, headers: Headers) -> bool:
    return scope["method"] == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers


def log_end(ended: Exchange) -> None:
    """The access line. It has lengths and times, never prompts, answers or keys."""
    level = logging.DEBUG if ended.path in OPEN_PATHS else logging.INFO
    if not log.isEnabledFor(level):
        return
    fields: dict[str, object] = {
        "request_id": ended.request_id,
        "method": ended.method,
        "route": ended.path[:200],
        "status": ended.status or "client left",
        "total_s": round(ended.total_s, 4),
    }
    if ended.answer_id:
        fields |= {
            "answer_id": ended.answer_id,
            "prompt_tokens": ended.num_prompt_tokens,
            "generated_tokens": ended.num_generated,
            "ttft_s": None if ended.first_token_s is None else round(ended.first_token_s, 4),
            "queue_s": None if ended.queue_s is None else round(ended.queue_s, 4),
            "finish_reasons": ",".join(ended.finish_reasons),
        }
    log.log(level, " ".join(f"{name}={_word(value)}" for name, value in fields.items()), extra={"fields": fields})


def _word(value: object) -> str:
    """So that a line stays one line, and its parts can be told apart."""
    text = str(value)
    return text if text.isprintable() and " " not in text else repr(text)


def _unauthorised(has_some: bool) -> Response:
    message = (
        "the API key in the Authorization header is not one of this server's"
        if has_some
        else "this server wants an API key, as the header Authorization: Bearer KEY"
    )
    content = errors.shape(401, message, code="invalid_api_key")
    return errors.json_response(401, content, {"www-authenticate": "Bearer"})


def _digest(key: str) -> bytes:
    """Of equal length for all keys, so that comparing them takes equally long."""
    return sha256(key.encode("utf-8", "surrogateescape")).digest()
