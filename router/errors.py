"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}} and the HTTP status that goes with them."""

from __future__ import annotations

from collections.abc import Mapping

import orjson
from starlette.responses import Response

from afd.errors import AfdError, RequestError

_UNAVAILABLE = 503


def status_of(error: Exception) -> int:
    """A RequestError has its own; trouble on our side is 503 when it may pass, and 500 when it is a bug."""
    if isinstance(error, RequestError):
        return error.status
    return _UNAVAILABLE if isinstance(error, AfdError) else 500


def body(error: Exception) -> bytes:
    """The JSON of `error`. A bug's text is for the log, not for the client."""
    status = status_of(error)
    if isinstance(error, RequestError):
        return shape(status, str(error), param=error.param, code=error.code)
    if status == _UNAVAILABLE:
        return shape(status, str(error), code="service_unavailable")
    return shape(status, "the router failed to handle this request; its log says why", code="internal_error")


def shape(status: int, message: str, *, param: str | None = None, code: str | None = None) -> bytes:
    """The JSON of an error with `status`."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    if status == _UNAVAILABLE:
        kind = "service_unavailable"
    return orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})


def response(error: Exception) -> Response:
    """The whole HTTP answer."""
    status = status_of(error)
    return json_response(status, body(error), {"retry-after": "1"} if status == _UNAVAILABLE else {})


def json_response(status: int, content: bytes, headers: Mapping[str, str] | None = None) -> Response:
    return Response(content, status_code=status, media_type="application/json", headers=headers)
