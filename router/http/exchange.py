"""One HTTP request and its answer: what the access log and the spans say of it, told when it is over."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.types import Scope

_KEY = "afd.exchange"
_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


@dataclass(slots=True)
class Exchange:
    """Belongs to one request, from FrontDoor's first sight of it to its end. Durations are seconds from `began_s`.

    `uid` is ours and unique; answers' ids end with it. `request_id` is the client's X-Request-Id if that is sane, else
    `uid`. What is about generation stays as it is for every other request.
    """

    method: str = ""
    path: str = ""
    traceparent: str = ""
    tracestate: str = ""
    uid: str = field(default_factory=lambda: uuid.uuid4().hex)
    request_id: str = ""
    began_ns: int = field(default_factory=time.time_ns)  # since 1970
    began_s: float = field(default_factory=time.perf_counter)
    status: int = 0  # 0: nothing was answered, for the client left
    error: str = ""  # the name of what was raised
    answer_id: str = ""
    operation: str = ""  # chat or text_completion
    streamed: bool = False
    num_prompt_tokens: int = 0
    num_generated: int = 0
    first_token_s: float | None = None
    queue_s: float | None = None  # of the choice that waited longest
    finish_reasons: Sequence[str] = ()
    max_tokens: int = 0
    temperature: float = 0.0

    @property
    def total_s(self) -> float:
        """So far."""
        return time.perf_counter() - self.began_s


def begin(scope: Scope) -> Exchange:
    """The exchange of an HTTP request that has just come; `of` finds it again."""
    headers = Headers(scope=scope)
    exchange = Exchange(
        method=scope["method"],
        path=scope["path"],
        traceparent=headers.get("traceparent", ""),
        tracestate=headers.get("tracestate", ""),
    )
    theirs = headers.get("x-request-id", "")
    exchange.request_id = theirs if _SANE_ID.fullmatch(theirs) else exchange.uid
    scope[_KEY] = exchange
    return exchange


def of(scope: Scope) -> Exchange:
    """The exchange of a request; one that nobody looks at where no FrontDoor stands before the application."""
    known = scope.get(_KEY)
    return known if isinstance(known, Exchange) else begin(scope)
