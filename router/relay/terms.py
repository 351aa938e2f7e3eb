"""What a client asks of the service beside the answer itself: how soon, how urgently, together with which others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from afd.errors import RequestError
from router.openai.schema import Request

SESSION_HEADER = "x-session-id"
TIMEOUT_HEADER = "x-request-timeout"


@dataclass(frozen=True, slots=True)
class Terms:
    """`timeout_s` counts from the moment the request is sent to a worker; None: it may take as long as it takes.
    `session`: see router.relay.policy; `priority` and `cache_salt`: see afd.types.GenerateRequest."""

    timeout_s: float | None = None
    priority: int = 0
    session: str = ""
    cache_salt: str = ""

    @classmethod
    def read(cls, request: Request, headers: Mapping[str, str], longest_s: float | None) -> Terms:
        """A field of the body counts before a header, and nobody gets more than `longest_s` (router.request_timeout_s).

        Raises RequestError for a header that is not a number of seconds."""
        asked = _seconds(headers) if request.timeout is None else request.timeout
        limits = [limit for limit in (asked, longest_s) if limit is not None]
        return cls(
            timeout_s=min(limits, default=None),
            priority=request.priority or 0,
            session=request.prompt_cache_key or request.user or headers.get(SESSION_HEADER, ""),
            cache_salt=request.cache_salt or "",
        )


def _seconds(headers: Mapping[str, str]) -> float | None:
    value = headers.get(TIMEOUT_HEADER)
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        message = f"the header {TIMEOUT_HEADER} is {value[:40]!r}; it must be a number of seconds above 0"
        raise RequestError(message, param=TIMEOUT_HEADER, code="invalid_value")
    return seconds
