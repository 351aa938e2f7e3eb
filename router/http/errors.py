"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}} and the HTTP status that goes with them."""

from __future__ import annotations

from collections.abc import Mapping

import orjson
from starlette.responses import Response

from afd.errors import AfdError, DeadlineExceeded, QueueFull, RequestError

_UNAVAILABLE = 503
_FULL = 429
_TOO_LATE = 504


def status_of(error: Exception) -> int:
    """A RequestError has its own; trouble on our side is 503 when it may pass, 429 when it is too many requests, 504
    when the request's time ran out, and 500 when it is a bug."""
    if isinstance(error, RequestError):
        return error.status
    if isinstance(error, QueueFull):
        return _FULL
    if isinstance(error, DeadlineExceeded):
        return _TOO_LATE
    return _UNAVAILABLE if isinstance(error, AfdError) else 500


def body(error: Exception) -> bytes:
    """The JSON of `error`. A bug's text is for the log, not for the client."""
    status = status_of(error)
    if isinstance(error, RequestError):
        return shape(status, str(error), param=error.param, code=error.code)
    code = {_UNAVAILABLE: "service_unavailable", _FULL: "rate_limit_exceeded", _TOO_LATE: "timeout"}.get(status)
    if code is not None:
        return shape(status, str(error), code=code)
    return shape(status, "the router failed to handle this request; its log says why", code="internal_error")


def shape(status: int, message: str, *, param: str | None = None, code: str | None = None) -> bytes:
    """The JSON of an error with `status`."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    kind = {_UNAVAILABLE: "service_unavailable", _FULL: "rate_limit_error", _TOO_LATE: "timeout_error"}.get(
        status, kind
    )
    return orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})


def response(error: Exception) -> Response:
    """The whole HTTP answer."""
    status = status_of(error)
    retry_after_s = error.retry_after_s if isinstance(error, QueueFull) else 1
    again = status in (_UNAVAILABLE, _FULL)
    return json_response(status, body(error), {"retry-after": str(retry_after_s)} if again else {})


def json_response(status: int, content: bytes, headers: Mapping[str, str] | None = None) -> Response:
    return Response(content, status_code=status, media_type="application/json", headers=headers)
